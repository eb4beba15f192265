"""What a trained run is used for."""
