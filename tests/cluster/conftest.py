"""What the tests of this folder share."""
import pytest
from launcher import Launcher


@pytest.fixture
def launcher(tmp_path):
    made = Launcher(tmp_path)
    yield made
    made.close()
