"""Which API a path belongs to, and what follows from that."""

import pytest

from worker.backends.streams.reading import accumulator_for
from worker.settings.schema import Settings
from worker.wire.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, OTHER, RESPONSES, Endpoint, endpoint_of


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions/?api-version=1", CHAT),
        ("/openai/deployments/gpt/chat/completions?api-version=2024-10-21", CHAT),
        ("/v1/completions", COMPLETIONS),
        ("/v1/completions/", COMPLETIONS),
        ("/completions", COMPLETIONS),
        ("/v1/responses", RESPONSES),
        ("/v1/embeddings?x=a/responses", EMBEDDINGS),
        ("/v1/responses/resp_1/cancel", OTHER),
        ("/v1/mychat/completionsx", OTHER),
        ("/v1/audio/speech", OTHER),
        ("/v1/other?x=/v1/responses", OTHER),
        ("", OTHER),
    ],
)
def test_the_end_of_a_path_decides(path: str, endpoint: Endpoint) -> None:
    """With any prefix and query; completions of a chat are not completions."""
    assert endpoint_of(path) is endpoint


def test_every_api_is_found_by_its_name() -> None:
    """No row of the table hides another."""
    assert [endpoint_of(f"/v1/{each.name}") for each in ENDPOINTS] == list(ENDPOINTS)


def test_what_can_be_streamed_can_be_assembled() -> None:
    """And nothing else."""
    for endpoint in (*ENDPOINTS, OTHER):
        assert (accumulator_for(endpoint) is not None) is endpoint.is_streamable


def test_the_paths_that_are_allowed_by_default_are_known() -> None:
    """What most operators serve is not left to the general rule."""
    paths = Settings.model_validate({}).request.allowed_paths
    assert OTHER not in {endpoint_of(path) for path in paths}
