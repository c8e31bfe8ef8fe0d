"""Which modules a config selects: as PEFT's check_target_module_exists (tuners/tuners_utils.py). Imports no torch.

Every question is asked of all the paths that a module is known by: as it is here, and as it was in training. Fields
that select need one of them, fields that exclude are content with any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loramux.lora.patterns import PathPattern, compile_bounded

_ALL = "all-linear"
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclass(frozen=True, slots=True)
class Selection:
    """What target_modules, exclude_modules, modules_to_save, layers_to_transform and layers_pattern say.

    targets, excluded  a pattern of the whole path, or ends of paths; targets None: everything
    replaced           patterns of modules that modules_to_save replaces: PEFT puts no LoRA into them
    layers             None: all
    """

    targets: PathPattern | frozenset[str] | None = None
    excluded: PathPattern | frozenset[str] = frozenset()
    replaced: tuple[re.Pattern[str], ...] = ()
    layers: frozenset[int] | None = None
    layer_patterns: tuple[re.Pattern[str], ...] = (_ANY_LAYER,)

    def excludes(self, path: str) -> bool:
        """Whether exclude_modules leaves the module at `path` out. Raises as left_out_by."""
        return _selects(self.excluded, path)

    def left_out_by(self, paths: Sequence[str], *, trained: int | None = None) -> str | None:
        """The field that keeps the module out, None if it is selected. Raises InvalidAdapter for a pattern that takes
        too long. Only the first `trained` paths are asked for exclusion."""
        if any(map(self.excludes, paths[:trained])):
            return "exclude_modules"
        if any(pattern.match(path) for path in paths for pattern in self.replaced):
            return "modules_to_save"
        if self.targets is not None and not any(_selects(self.targets, path) for path in paths):
            return "target_modules"
        if self.layers is None or (isinstance(self.targets, frozenset) and not self.targets.isdisjoint(paths)):
            return None  # PEFT asks for the layer of no module that is named in full
        return None if any(self._layer(path) in self.layers for path in paths) else "layers_to_transform"

    def _layer(self, path: str) -> int | None:
        match = next((m for pattern in self.layer_patterns if (m := pattern.match(path))), None)
        return None if match is None else int(match["idx"])


def selection(
    target_modules: Sequence[str] | str | None,
    exclude_modules: Sequence[str] | str | None,
    modules_to_save: Iterable[str],
    layers_to_transform: Sequence[int] | int | None,
    layers_pattern: Sequence[str] | str | None,
) -> Selection:
    """From the config's fields. Raises InvalidAdapter for what is no regular expression."""
    targets: PathPattern | frozenset[str] | None
    if isinstance(target_modules, str):
        targets = None if target_modules.lower() == _ALL else PathPattern("target_modules", target_modules)
    else:
        targets = None if target_modules is None else frozenset(target_modules)
    excluded = (
        PathPattern("exclude_modules", exclude_modules)
        if isinstance(exclude_modules, str) and exclude_modules
        else frozenset(exclude_modules or ())
    )
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    found = compile_bounded("layers_pattern", {p: rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns or () if p})
    saved = compile_bounded("modules_to_save", {m: rf"(^|.*\.){m}($|\..*)" for m in modules_to_save if m})
    return Selection(
        targets,
        excluded,
        tuple(saved.values()),
        frozenset(layers) if layers else None,
        tuple(found.values()) or (_ANY_LAYER,),
    )


def _selects(of: PathPattern | frozenset[str], path: str) -> bool:
    if isinstance(of, PathPattern):
        return of.matches(path)
    at = 0
    while at >= 0:  # the path, then what follows each dot
        if path[at:] in of:
            return True
        at = path.find(".", at) + 1 or -1
    return False
