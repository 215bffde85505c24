"""An accelerated pipeline is copied and pickled as a plain one: the copy has the methods, and stands on its own."""

from __future__ import annotations

import copy
import io
import logging
import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar

import pytest
import tiny
import tiny_others
import torch
from diffusers import AutoPipelineForImage2Image, FluxImg2ImgPipeline, FluxPipeline, StableDiffusionImg2ImgPipeline

import diffaccel
from diffaccel.config import Config
from diffaccel.errors import DiffAccelError
from diffaccel.flow import VE_PATH
from diffaccel.quant import TIB
from diffaccel.runtime.probe import open_session
from diffaccel.samplers import BoN, DiffusersCache, Euler, Heun, Scheduler, TaylorSeer, rewards
from tests.support.small_pipelines import Small, draw, make


def through_torch(pipe: Any) -> Any:
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


WAYS = {
    "pickle": through_pickle, "copy": copy.copy, "deepcopy": copy.deepcopy, "torch": through_torch,
}  # fmt: skip


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


@dataclass(frozen=True, kw_only=True)
class Negate(Config):
    """A block method whose handle is a value."""

    name: ClassVar[str] = "negate"
    touches: ClassVar[Any] = "blocks"

    def apply(self, pipe: Any) -> Any:
        return pipe.unet.register_forward_hook(negate)


def negate(module: Any, args: Any, out: Any) -> Any:
    return tuple(-value for value in out)


def check_copies(pipe: Any, stock: Any, call: Callable[[Any], Any]) -> None:
    """Compare all kinds of copies with the pipeline, and those without methods with the stock call."""
    wrapped, kind = call(pipe), type(stock)
    for name, duplicate in WAYS.items():
        again = duplicate(pipe)
        assert again is not pipe and isinstance(again, kind), name
        assert torch.equal(call(again), wrapped), name
        assert diffaccel.summary(again).methods == diffaccel.summary(pipe).methods, name
        if name == "copy" and len(diffaccel.summary(pipe).methods) > 1:
            continue  # the network is shared, and so are the methods on it
        diffaccel.remove(again)
        assert type(again) is kind and torch.equal(call(again), call(stock)), name
        assert torch.equal(call(pipe), wrapped), name


@pytest.mark.parametrize("configs", [(Euler(),), (Scheduler(),), (Euler(), Negate())], ids=["euler", "own", "stack"])
def test_a_copy_has_the_methods_and_can_be_freed_of_them(configs: tuple[Any, ...]) -> None:
    pipe = diffaccel.accelerate(make(Small), *configs)
    check_copies(pipe, make(Small), draw)
    assert torch.equal(draw(pickle.loads(pickle.dumps(pipe, 0))), draw(pipe))


def sd_call(pipe: Any) -> torch.Tensor:
    return pipe(**tiny.call_kwargs("sd", batch=1, steps=2)).images


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["compress + 0.1*compress:50", brightness], ids=["named", "function"])
def test_a_search_is_copied_also_after_a_call(reward: Any) -> None:
    pipe = diffaccel.accelerate(tiny.make("sd"), BoN(reward=reward, budget=4))
    check_copies(pipe, tiny.make("sd"), sd_call)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd"])  # text encoders of others keep hooks that no pickle takes
def test_pipelines_of_every_kind_are_copied(name: str) -> None:
    def call(pipe: Any) -> torch.Tensor:
        return pipe(**tiny.call_kwargs(name)).images

    check_copies(diffaccel.accelerate(tiny.make(name), Heun()), tiny.make(name), call)


@pytest.mark.slow
def test_an_unlisted_pipeline_is_copied() -> None:
    def call(pipe: Any) -> torch.Tensor:
        return pipe(**tiny_others.call_kwargs("qwen")).images

    check_copies(diffaccel.accelerate(tiny_others.make("qwen"), Euler()), tiny_others.make("qwen"), call)


def test_a_part_that_knows_its_pipeline_is_copied_with_it() -> None:
    pipe = make(Small)
    pipe.encode_prompt = MethodType(Small.encode_prompt, pipe)
    diffaccel.accelerate(pipe, Euler())
    for duplicate in (through_pickle, copy.deepcopy):
        again = duplicate(pipe)
        assert again.encode_prompt.__self__ is again
        assert torch.equal(draw(again), draw(pipe))


def test_a_shallow_copy_shares_the_network_and_what_is_on_it() -> None:
    pipe = diffaccel.accelerate(make(Small), Euler(), Negate())
    again = copy.copy(pipe)
    diffaccel.remove(again)
    assert [method["name"] for method in diffaccel.summary(pipe).methods] == ["euler"]
    euler = draw(diffaccel.accelerate(make(Small), Euler()))
    assert torch.equal(draw(pipe), euler) and torch.equal(draw(again), draw(make(Small)))
    diffaccel.accelerate(again, Heun())
    assert torch.equal(draw(pipe), euler)


def test_a_copy_that_could_not_be_freed_of_a_method_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bound(Negate):
        def apply(self, pipe: Any) -> Any:
            hook = super().apply(pipe)

            class Handle:
                def remove(self) -> None:
                    hook.remove()

            return Handle()

    pipe = diffaccel.accelerate(make(Small), Bound(), Euler())
    with pytest.raises(DiffAccelError, match=r"'negate' is on a network.*diffaccel\.remove\(pipe\), copy"):
        copy.deepcopy(pipe)
    diffaccel.remove(pipe)
    assert torch.equal(draw(copy.deepcopy(pipe)), draw(make(Small)))


def in_another_process(pipe: Any, results: Any) -> None:
    torch.set_num_threads(1)
    wrapped = sd_call(pipe)
    diffaccel.remove(pipe)
    results.put((wrapped.numpy(), sd_call(pipe).numpy()))


def test_a_copy_under_hooks_of_diffusers_is_refused_and_one_after_them_is_whole() -> None:
    """They are closures over the network: under them a copy's blocks would be those of the original."""
    pipe = diffaccel.accelerate(tiny.make("flux"), DiffusersCache())
    with pytest.raises(DiffAccelError, match=r"'diffusers_cache' .* could not be freed of.*copy, and accelerate both"):
        copy.deepcopy(pipe)
    with pytest.raises(DiffAccelError, match=r"'diffusers_cache' .* no pickle takes.*pickle it, and accelerate both"):
        pickle.dumps(pipe)
    assert copy.copy(pipe).transformer is pipe.transformer
    copy.deepcopy(diffaccel.remove(pipe))
    pickle.dumps(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("config", [Euler(), BoN(reward="compress", budget=4)], ids=["euler", "bon"])
def test_a_spawned_process_receives_it(config: Any) -> None:
    pipe = diffaccel.accelerate(tiny.make("sd"), config)
    wrapped = sd_call(pipe)
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=in_another_process, args=(pipe, results))
    process.start()
    theirs = [torch.from_numpy(picture) for picture in results.get(timeout=120)]
    process.join(60)
    assert torch.equal(theirs[0], wrapped) and torch.equal(theirs[1], sd_call(tiny.make("sd")))


@pytest.mark.parametrize("name", ["compress", "compress - 0.2*compress:10"])
def test_rewards_are_pickled_by_their_names_or_parts(name: str) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    reward = rewards.resolve(name, device="cpu")
    counts = rewards.counts(brightness_twice, {"apple": 1, "cat": 2})
    total = rewards.weighted([(0.5, reward), (2.0, counts)])
    for original in (reward, counts, total):
        again = through_pickle(original)
        assert again.name == original.name
        assert torch.equal(again(images, ["", ""]), original(images, ["", ""]))


def brightness_twice(images: torch.Tensor, things: list[str]) -> torch.Tensor:
    return brightness(images, things)[:, None].expand(-1, 2)


def test_a_session_is_pickled_with_its_pipeline() -> None:
    with open_session(tiny.make("sd"), **tiny.call_kwargs("sd")) as session:
        again = through_pickle(session)
        assert again.path is session.path is VE_PATH
        assert torch.equal(again.x, session.x)
        assert torch.equal(again.at(64, 64).x, session.at(64, 64).x)


def test_what_goes_on_without_the_methods_says_so_once(tmp_path: Any, caplog: Any) -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Euler())
    pipe.enable_attention_slicing()  # looks at all components
    with caplog.at_level(logging.WARNING, "diffaccel"):
        for _ in range(2):
            assert type(FluxImg2ImgPipeline.from_pipe(pipe)) is FluxImg2ImgPipeline
            assert type(AutoPipelineForImage2Image.from_pipe(pipe)) is FluxImg2ImgPipeline
        assert [record.message for record in caplog.records if record.name.startswith("diffaccel")] == [
            "from_pipe makes a plain pipeline of the same parts, without 'euler': "
            "call diffaccel.accelerate on that one as well."
        ]
        caplog.clear()
        for _ in range(2):
            pipe.save_pretrained(tmp_path)
        assert [record.message for record in caplog.records if record.name.startswith("diffaccel")] == [
            "save_pretrained writes the plain pipeline, without 'euler': call diffaccel.accelerate on that one as well."
        ]
    assert type(FluxPipeline.from_pretrained(tmp_path)) is FluxPipeline


@pytest.mark.parametrize("name, method", [("flux", TIB()), ("sd", TaylorSeer(interval=2))], ids=["tib", "taylorseer"])
def test_from_pipe_takes_a_network_whose_class_a_method_made(name: str, method: Any) -> None:
    """``from_pipe`` compares classes of networks; it makes a plain pipeline of the same parts under any method."""
    pipe, other = tiny.make(name), {"flux": FluxImg2ImgPipeline, "sd": StableDiffusionImg2ImgPipeline}[name]
    network = getattr(pipe, "transformer" if name == "flux" else "unet")
    stock = type(network)
    diffaccel.accelerate(pipe, method)
    made = other.from_pipe(pipe)
    assert type(made) is other and any(part is network for part in made.components.values())
    assert type(network) is not stock and type(network) in (stock,) and hash(type(network)) == hash(stock)
    diffaccel.remove(pipe)
    assert type(network) is stock
