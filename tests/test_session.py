"""What a sampler may ask of a session: rows, levels, branches, conditionings, other resolutions, pixels."""

from __future__ import annotations

import pytest
import tiny
import torch

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.families import find
from diffaccel.runtime.native import Native
from diffaccel.samplers import Euler
from diffaccel.session import Decode, Eval

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 kernels of another batch size


@pytest.fixture(params=tiny.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def session(family: str):
    pipe = tiny.make(family)
    with torch.no_grad(), diffaccel.open_session(pipe, **tiny.call_kwargs(family)) as opened_session:
        yield opened_session


def ask(session, *evals: Eval, **driver):
    return Native(session, **driver).predict(list(evals))


def test_driving_a_session_by_hand_gives_the_wrapped_call(family: str) -> None:
    pipe = tiny.make(family)
    with torch.no_grad(), diffaccel.open_session(pipe, **tiny.call_kwargs(family)) as session:
        driver = Native(session)
        by_hand = driver.run(Euler().sample(session))
    assert torch.equal(by_hand, pipe(**tiny.call_kwargs(family)).images)
    assert driver.stats.steps == 4 and driver.stats.nfe == 8 and driver.stats.forwards == 16


def test_one_level_per_row(session) -> None:
    """Rows at different noise levels in one call equal the rows one by one."""
    a, b = session.sigmas[0], session.sigmas[2]
    x = session.x
    both = ask(session, Eval(x, torch.stack([a, b])))[0]
    for row, sigma in enumerate((a, b)):
        alone = ask(session, Eval(x[row : row + 1], sigma, rows=[row]))[0]
        for part in ("v", "x0", "eps"):
            torch.testing.assert_close(getattr(both, part)[row : row + 1], getattr(alone, part), **CLOSE)


def test_x_is_made_of_x0_and_eps(session) -> None:
    sigma = session.sigmas[1]
    pred = ask(session, Eval(session.x, sigma))[0]
    torch.testing.assert_close(session.path.mix(pred.x0, pred.eps, sigma), session.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(session.path.velocity(pred.x0, pred.eps, sigma), pred.v, rtol=1e-3, atol=1e-3)


def test_branches_combine_to_the_guided_prediction(session, family: str) -> None:
    sigma = session.sigmas[1]
    guided, positive, negative = (
        ask(session, Eval(session.x, sigma, branch=b))[0].v for b in ("guided", "positive", "negative")
    )
    scale = 3.0 if family == "flux" else 5.0
    assert not torch.equal(positive, negative)
    # the rule is linear in the network's output, and the velocity is affine in it with one slope
    torch.testing.assert_close(guided, negative + scale * (positive - negative), rtol=1e-3, atol=1e-3)


def test_several_requests_share_a_call_and_keep_their_order(session) -> None:
    a, b = session.sigmas[0], session.sigmas[1]
    driver = Native(session)
    first, second, third = driver.predict([Eval(session.x, a), Eval(session.x, b), Eval(session.x[:1], b, rows=[1])])
    merged_calls = driver.stats.calls
    assert driver.stats.nfe == 5
    for pred, request in (
        (first, Eval(session.x, a)),
        (second, Eval(session.x, b)),
        (third, Eval(session.x[:1], b, rows=[1])),
    ):
        torch.testing.assert_close(pred.v, ask(session, request)[0].v, **CLOSE)
    driver.predict([Eval(session.x, a)])
    assert driver.stats.calls == 2 * merged_calls  # three requests cost the calls of one


def test_many_particles_in_chunks(session) -> None:
    sigma = session.sigmas[0]
    rows = [0, 0, 1, 1, 0]
    x = torch.randn(5, *session.x.shape[1:], generator=torch.Generator().manual_seed(0))
    unchunked = ask(session, Eval(x, sigma, rows=rows))[0].v
    chunked = ask(session, Eval(x, sigma, rows=rows), max_batch=2)[0].v
    torch.testing.assert_close(chunked, unchunked, **CLOSE)


def test_another_conditioning_by_handle(session, family: str) -> None:
    handle = session.add_cond(prompt=["a cup", "a hat"])
    sigma = session.sigmas[0]
    own = ask(session, Eval(session.x, sigma, branch="positive"))
    other = ask(session, Eval(session.x, sigma, cond=handle, branch="positive"))
    assert handle == 1 and not torch.equal(own[0].v, other[0].v)
    kwargs = {**tiny.call_kwargs(family), "prompt": ["a cup", "a hat"]}
    with diffaccel.open_session(session.pipe, **kwargs) as direct:
        assert torch.equal(direct.x, session.x)
        torch.testing.assert_close(ask(direct, Eval(direct.x, sigma, branch="positive"))[0].v, other[0].v, **CLOSE)
    together = ask(session, *[Eval(session.x, sigma, cond=c, branch="positive") for c in (0, handle)])
    torch.testing.assert_close(together[0].v, own[0].v, **CLOSE)
    torch.testing.assert_close(together[1].v, other[0].v, **CLOSE)


def test_the_same_resolution_is_the_same_session(session) -> None:
    assert session.at(session.height, session.width) is session
    small = session.at(64, 32)
    assert session.at(64, 32) is small and small.at(32, 32) is session


def test_another_resolution_is_a_fresh_call_there(session, family: str) -> None:
    other = session.at(64, 48 if family in tiny.FLOW else 40)
    size = {"height": other.height, "width": other.width}
    final = {"original_size": (32, 32), "target_size": (32, 32)} if family == "sdxl" else {}
    with diffaccel.open_session(session.pipe, **{**tiny.call_kwargs(family), **size, **final}) as fresh:
        assert torch.equal(fresh.x, other.x) and torch.equal(fresh.sigmas, other.sigmas)
        sigma = fresh.sigmas[1]
        assert torch.equal(ask(fresh, Eval(fresh.x, sigma))[0].v, ask(other, Eval(other.x, sigma))[0].v)
        inside = ask(session, Eval(other.x, sigma, at=other))[0].v
        assert torch.equal(inside, ask(other, Eval(other.x, sigma))[0].v)


def test_cost_is_counted_by_width_and_height(session) -> None:
    driver, portrait = Native(session), session.at(64, 32)
    driver.predict([Eval(session.x, session.sigmas[0])])
    driver.predict([Eval(portrait.x, session.sigmas[0], at=portrait)])
    assert driver.stats.nfe_by_resolution == {"32x32": 2, "32x64": 2}


def test_fixed_latents_cannot_change_resolution(family: str) -> None:
    pipe = tiny.make(family)
    with diffaccel.open_session(pipe, **tiny.call_kwargs(family)) as session:
        fixed = session.family.to_network(session.x) if family == "flux" else session.x
    kwargs = {**tiny.call_kwargs(family), "latents": fixed}
    with (
        diffaccel.open_session(pipe, **kwargs) as session,
        pytest.raises(DiffAccelError, match="`latents` were passed for 32x32; it also works at 48x64"),
    ):
        session.at(64, 48)


def test_decode_is_the_pipelines_own(session, family: str) -> None:
    class Decoded(Exception):
        pass

    def sampler():
        x = session.x
        for sigma, after in zip(session.sigmas[:-1], session.sigmas[1:], strict=True):
            x = x + (after - sigma) * (yield Eval(x, sigma)).v
        pixels = yield Decode(x)
        raise Decoded(pixels)

    with pytest.raises(Decoded) as caught:
        Native(session).run(sampler())
    pixels = caught.value.args[0]
    stock = session.pipe(**{**tiny.call_kwargs(family), "output_type": "pt"}).images
    assert pixels.shape == (2, 3, 32, 32)
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), stock, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [None, [0], [0, 0, 2]])
def test_rows_must_be_said_and_exist(session, rows) -> None:
    x = session.x[:1].expand(3, -1, -1, -1)
    with pytest.raises(DiffAccelError, match="rows"):
        ask(session, Eval(x, session.sigmas[0], rows=rows))


def test_the_negative_branch_needs_guidance(family: str) -> None:
    pipe = tiny.make(family)
    with diffaccel.open_session(pipe, **tiny.call_kwargs(family, guided=False)) as session:
        with pytest.raises(DiffAccelError, match="guidance scale above 1"):
            ask(session, Eval(session.x, session.sigmas[0], branch="negative"))


def test_noise_of_a_row_depends_on_its_own_generator(family: str) -> None:
    pipe = tiny.make(family)
    with diffaccel.open_session(pipe, **tiny.call_kwargs(family)) as both:
        noise = both.randn_like(both.x)
        with pytest.raises(DiffAccelError, match="one per row"):
            both.randn_like(both.x[:1])
    kwargs = {**tiny.call_kwargs(family, batch=1), "generator": [torch.Generator().manual_seed(1)]}
    with diffaccel.open_session(pipe, **kwargs) as alone:
        assert torch.equal(alone.randn_like(alone.x), noise[1:])


def test_families_are_found_by_class_and_base() -> None:
    pipe = tiny.make("sd")

    class Mine(type(pipe)):  # type: ignore[misc]
        pass

    assert find(Mine(**pipe.components, requires_safety_checker=False)).name == "sd"


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_packing_is_the_pipelines_own(name: str) -> None:
    pipe = tiny.make(name)
    fam = find(pipe)
    x = torch.randn(2, 4, 4, 6)
    assert torch.equal(fam.from_network(fam.to_network(x), x), x)
    assert torch.equal(fam.spatial(pipe, fam.to_network(x), 32, 48), x)
    if name == "flux":
        assert torch.equal(fam.to_network(x), pipe._pack_latents(x, 2, 4, 4, 6))
        assert torch.equal(
            fam.spatial(pipe, fam.to_network(x), 32, 48), pipe._unpack_latents(fam.to_network(x), 32, 48, 8)
        )
