"""What the tests of this folder share."""
import pytest
from support import jobs
from support.launcher import Launcher


@pytest.fixture
def launcher(tmp_path):
    made = Launcher(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
    """The losses of two ranks of `jobs.SLOW` to which nothing happens."""
    return jobs.undisturbed(tmp_path_factory.mktemp('undisturbed'))
