"""A checkpoint's quantisation as a table: which modules are stored how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from quire.quant.names import Patterns, is_embedding, usually_dense
from quire.quant.storage import Fp8, Storage


@dataclass(frozen=True)
class Rule:
    """What modules that one of `targets` ("*" means all) means are stored as; None: as they are."""

    targets: tuple[str, ...]
    storage: Storage | None


@dataclass(frozen=True)
class Scheme:
    """`name` for people; the first of `rules` that means a module counts. `ignore`: patterns of
    modules that are stored as they are. `everything`: rules mean modules, too, that tools usually
    leave alone. `kv_cache`: the checkpoint was made for a quantised KV cache, of this kind."""

    name: str
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    everything: bool = False
    kv_cache: str = ""

    def find(self, module: str) -> Storage | None:
        """How a module's weight is stored; None for as it is. Raises ModelError for a bad
        pattern."""
        if module not in self._found:
            self._found[module] = self._find(module)
        return self._found[module]

    def _find(self, module: str) -> Storage | None:
        if self.ignored(module) or (usually_dense(module) and not self.everything):
            return None
        if is_embedding(module) and self._targets.first(module) is None:
            return None  # "*" means linear layers
        return self.storage_of(module)

    def ignored(self, module: str) -> bool:
        return self._ignored.first(module) is not None

    def storage_of(self, module: str) -> Storage | None:
        """As `find`, of a module that is quantised although one would not expect it."""
        place = self._targets.first(module)
        if place is not None:
            return self._storages[place]
        return next((rule.storage for rule in self.rules if "*" in rule.targets), None)

    def quantises_tokens(self, module: str) -> bool:
        """Whether a module's products are meant for activations in e4m3."""
        storage = self.find(module) or self.storage_of(module)
        return isinstance(storage, Fp8) and storage.activation != "none"

    @cached_property
    def _found(self) -> dict[str, Storage | None]:
        """What `find` answered: a model's thousands of experts are asked for more than once."""
        return {}

    @cached_property
    def _ignored(self) -> Patterns:
        return Patterns(self.ignore)

    @cached_property
    def _storages(self) -> list[Storage | None]:
        return [rule.storage for rule in self.rules for _ in rule.targets]

    @cached_property
    def _targets(self) -> Patterns:
        # The pattern that means all comes last, whatever its place.
        return Patterns([t if t != "*" else "" for rule in self.rules for t in rule.targets])

    def formats(self, matrices: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, str]:
        """The format of each weight among (name, shape) that is quantised, without its files.
        Raises ModelError where groups do not divide a width."""
        found = {}
        for name, shape in matrices:
            module, _, last = name.rpartition(".")
            storage = self.find(module) if last == "weight" else None
            if storage is not None:
                storage.check_width(module, shape[1])
                found[name] = storage.layout
        return found
