"""Which modules an adapter config means, and with what rank and alpha: PEFT's own rules, in bounded work.

Compared with PEFT 0.21.2 (`check_target_module_exists`, `get_pattern_key`) by tests that run both.
"""

import re

from moerge.tensors import patterns
from moerge.tensors.config import AdapterConfig
from moerge.tensors.patterns import Budget, KeyTable

_ALL_LINEAR = "all-linear"


def of_base(module: str) -> str:
    """The module of the base model that PEFT wrapped: in nn.MultiheadAttention, LoRA's name goes on inside it."""
    return module.partition(".base_layer")[0]


class Targets:
    """Answers for the modules of one config; all questions together spend one budget."""

    def __init__(self, config: AdapterConfig) -> None:
        self._config = config
        self._budget = Budget()
        self._ranks = KeyTable(config.rank_pattern, pointer="/rank_pattern")
        self._alphas = KeyTable(config.alpha_pattern, pointer="/alpha_pattern")
        self._names = frozenset(config.target_modules if isinstance(config.target_modules, tuple) else ())
        feedforward = config.feedforward_modules
        self._feedforward = frozenset(feedforward if isinstance(feedforward, tuple) else ())
        self._feedforward_lengths = sorted({len(name) for name in self._feedforward})

    def rank(self, module: str) -> int:
        """The rank the config gives a module: the first matching rank_pattern, else r."""
        if not self._config.rank_pattern:
            return self._config.r
        key = self._ranks.key_for(of_base(module), self._budget)
        return self._config.rank_pattern.get(key, self._config.r)

    def alpha(self, module: str) -> float:
        """The alpha the config gives a module: the first matching alpha_pattern, else lora_alpha."""
        if not self._config.alpha_pattern:
            return self._config.lora_alpha
        key = self._alphas.key_for(of_base(module), self._budget)
        return self._config.alpha_pattern.get(key, self._config.lora_alpha)

    def is_target(self, module: str) -> bool:
        """Whether PEFT would put an adapter on the module. True where only the base model could tell."""
        config = self._config
        module = of_base(module)
        if self._is_excluded(module):
            return False
        targets = config.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == _ALL_LINEAR):
            return True
        if isinstance(targets, str):
            return patterns.matches(targets, module, self._budget, whole=True)
        if module in self._names:
            return True
        return self._ends_with_name(module, self._names) and self._is_wanted_layer(module)

    def is_feedforward(self, module: str) -> bool | None:
        """Whether IA3 multiplies what the module takes in; None where only the base model could tell."""
        wanted = self._config.feedforward_modules
        if wanted is None:
            return None
        if isinstance(wanted, str):
            return patterns.matches(wanted, module, self._budget, whole=True, pointer="/feedforward_modules")
        # Names of few lengths cost next to nothing. PEFT takes any end of a name, not only one after a dot.
        self._budget.spend(len(self._feedforward_lengths) // 8)
        return any(module[len(module) - length :] in self._feedforward for length in self._feedforward_lengths
                   if length <= len(module))  # fmt: skip

    def is_saved(self, path: str) -> bool:
        """Whether the parameter at `path` belongs to one of modules_to_save."""
        parts = path.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts))]
        self._budget.spend(len(self._config.modules_to_save))
        return any(prefix.endswith(name) for name in self._config.modules_to_save for prefix in prefixes)

    def _is_excluded(self, module: str) -> bool:
        config = self._config
        excluded = config.exclude_modules
        if isinstance(excluded, str):
            if excluded and patterns.matches(excluded, module, self._budget, whole=True, pointer="/exclude_modules"):
                return True
        elif excluded and self._ends_with_name(module, frozenset(excluded)):
            return True
        return any(self._lies_in(module, name) for name in config.modules_to_save)

    def _lies_in(self, module: str, name: str) -> bool:
        """Whether the module is `name`, or in it, or in another module whose last part is `name`."""
        self._budget.spend(1)
        if patterns.PLAIN.fullmatch(name) and "." not in name:
            return f".{name}." in f".{module}."
        expression = rf"(^|.*\.){name}($|\..*)"
        return patterns.matches(expression, module, self._budget, whole=False, pointer="/modules_to_save")

    def _ends_with_name(self, module: str, names: frozenset[str]) -> bool:
        """Whether the module's name, or a tail of it that starts after a dot, is one of the names."""
        self._budget.spend(1)
        tail = module
        while tail not in names:
            _, dot, tail = tail.partition(".")
            if not dot:
                return False
        return True

    def _is_wanted_layer(self, module: str) -> bool:
        wanted = self._config.layers_to_transform
        if not wanted:
            return True
        found = self._layer_index(module)
        return found is not None and found in wanted

    def _layer_index(self, module: str) -> int | None:
        """The number of the layer a module lies in: the first numbered part, or the one after a layers_pattern."""
        names = self._config.layers_pattern
        if not names:
            # The number needs a part before its own list's name ("model.layers.3."), as in PEFT.
            parts = module.split(".")
            return next((int(part) for part in parts[2:-1] if part.isdecimal()), None)
        for name in names:
            # A name that is itself a pattern cannot be placed here in bounded work; any layer is then accepted.
            if not patterns.PLAIN.fullmatch(name):
                return next(iter(self._config.layers_to_transform or ()), None)
            match = re.match(rf"(?:^|.*?\.){name}\.(?P<index>[0-9]+)\.", module)
            if match is not None:
                return int(match["index"])
        return None
