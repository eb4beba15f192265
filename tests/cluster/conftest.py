"""What the tests of this folder share."""
import pytest
from support.launcher import Launcher


@pytest.fixture
def launcher(tmp_path):
    made = Launcher(tmp_path)
    yield made
    made.close()
