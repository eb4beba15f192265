"""Where a model runs (`placement`) and how its replicas agree (`aggregate`, through `stores`): independent choices."""
