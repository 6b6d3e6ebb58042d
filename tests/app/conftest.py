"""What the tests of the app share."""

import pytest
from small import write_small_flow

from diffusers_guidance import samples


@pytest.fixture(scope="session")
def small_models(small, tmp_path_factory):
    """The first of the bundled models, for `samples.MODEL`: small ones in the place of each, of the same names."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "emoji").symlink_to(small)
    if len(samples.models()) > 1:
        write_small_flow(folder / "emoji-flow")
    return folder / "emoji"
