"""``diffaccel sample`` on a pipeline that draws its video chunk by chunk, with the ring for its context."""

from __future__ import annotations

import pytest
import tiny_more
from diffusers import AnyFlowFARPipeline, FlowMapEulerDiscreteScheduler

from tests.support.chunked import tiny_network


@pytest.mark.slow
def test_a_folder_is_sampled_by_the_command(run, tmp_path):
    parts = tiny_more.make("wan")
    channels = parts.vae.config.z_dim
    network = tiny_network(
        in_channels=channels, out_channels=channels, text_dim=parts.text_encoder.config.d_model, num_layers=1,
        chunk_partition=(1, 2),
    )  # fmt: skip
    scheduler = FlowMapEulerDiscreteScheduler()
    pipe = AnyFlowFARPipeline(parts.tokenizer, parts.text_encoder, network, parts.vae, scheduler)
    pipe.save_pretrained(tmp_path / "anyflow")
    words = ("sample", "a cat", "--model", tmp_path / "anyflow", "--frames", 9, "--size", 32, "--steps", 2)
    done = run(*words, "--device", "cpu", "--method", "rolling_context", "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    (clip,) = done.json["images"]
    assert clip["frames"] == 9 and "graphs" not in done.json["cost"]  # those are of 'capture'
