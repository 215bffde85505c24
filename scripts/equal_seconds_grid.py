"""Options of every preset, cache, mix and peer that a comparison at equal seconds goes through on ``emoji-flux``."""

from __future__ import annotations

STEPS = (6, 8, 10, 14, 20, 28)
_SPEED = "bottleneck.preset=speed,bottleneck.tolerance={},steps={}"

PRESETS = [
    *(f"bottleneck:preset=speed,tolerance={tolerance},steps={n}" for tolerance in (0.002, 0.01) for n in STEPS),
    *(f"bottleneck:preset=lightx2v,scales=[0.5,1],switches=[{share}],steps={n}" for share in (0.1, 0.3) for n in STEPS),
    *(f"bottleneck:preset=selflift-zero,switches=[{share}],steps={n}" for share in (0.25, 0.5) for n in (4, 6, 8)),
    *(f"bottleneck:preset=bottleneck,steps={n}" for n in (8, 14, 20, 28)),
]
CACHES = [
    *(f"euler+spectrum:steps={n},spectrum.growth={growth}" for n in (28, 50) for growth in (0.5, 0.75, 3)),
    *(f"euler+taylorseer:steps={n},taylorseer.warmup=2,taylorseer.interval={every}"
      for n, every in ((10, 2), (14, 2), (14, 3), (20, 2), (20, 3), (28, 3), (28, 4))),
    *(f"euler+seacache:steps={n},seacache.threshold={bound}"
      for n, bound in ((14, 0.3), (14, 0.6), (20, 0.6), (28, 0.3), (28, 0.6), (28, 0.9))),
    *(f"euler+firstblock:steps={n},firstblock.threshold={bound}"
      for n, bound in ((14, 0.1), (20, 0.1), (28, 0.05), (28, 0.1), (28, 0.2))),
    *(f"euler+firstblock:steps={n},firstblock.threshold={bound},firstblock.payload=linear"
      for n, bound in ((14, 0.1), (28, 0.1))),
]  # fmt: skip
MIXES = [
    *(f"bottleneck+taylorseer:{_SPEED.format(0.002, n)},taylorseer.warmup=2,taylorseer.interval=2"
      for n in (14, 20, 28)),
    *(f"bottleneck+spectrum:{_SPEED.format(0.002, n)},spectrum.warmup=2" for n in (20, 28, 50)),
    *(f"bottleneck+seacache:{_SPEED.format(0.002, n)},seacache.threshold=0.6" for n in (14, 20, 28)),
    *(f"bottleneck+firstblock:{_SPEED.format(0.002, n)},firstblock.threshold=0.1" for n in (14, 28)),
    *("bottleneck+taylorseer:bottleneck.preset=lightx2v,bottleneck.scales=[0.5,1],bottleneck.switches=[0.1],"
      f"steps={n},taylorseer.warmup=2,taylorseer.interval=2" for n in (14, 20)),
]  # fmt: skip
# as their packages have them, and at further values of their one knob
PEERS = [
    *(f"euler+cache_dit:steps={n},cache_dit.two_calls=true,cache_dit.threshold={bound}"
      for n, bound in ((28, 0.08), (28, 0.2), (50, 0.08), (50, 0.2))),
    *(f"euler+diffusers_cache:steps={n},diffusers_cache.options={{'threshold': {bound}}}"
      for n, bound in ((14, 0.1), (28, 0.05), (28, 0.12), (50, 0.12))),
    *(f"euler+diffusers_cache:steps={n},diffusers_cache.kind=taylorseer,"
      f"diffusers_cache.options={{'cache_interval': {k}}}" for n, k in ((14, 2), (28, 3), (50, 5))),
    *(f"bottleneck:preset=speed,noise=fresh,tolerance={tolerance},steps={n}"
      for n in (10, 28, 50) for tolerance in (0.01, 0.05)),
]  # fmt: skip
SETS = {"presets": PRESETS, "caches": CACHES, "mixes": MIXES, "peers": PEERS}
