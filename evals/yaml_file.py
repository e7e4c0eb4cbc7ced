"""YAML files that users write: keys that occur twice and files that grow without end are refused; nothing but plain values is made of them."""

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from proxytune.errors import UserError, brief, shortened
from proxytune.files import check_readable

MOST_NODES = 100_000  # of a file with every alias written out


def read_yaml(path: Path, field: str, advice: str) -> dict[str, Any]:
    """The keys and values of a file. Raises `UserError`, with `field` and the `advice` where examples are, for a file that is missing,
    is not YAML or holds something else."""
    check_readable(path, field)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise UserError(f"{field}: there is no file '{path}'; {advice}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shortened(" ".join(str(error).split()), 400)
        raise UserError(f"{field}: '{path}' cannot be read as YAML ({reason}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{field}: '{path}' must hold keys and values, not {type(content).__name__}; {advice}")
    return content


class _Loader(yaml.SafeLoader):
    """Plain YAML. Refuses keys that occur twice, and files that are too large with their aliases expanded."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._check(node, {})
        return self.construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # such as a number of 5,000 digits, or a 13th month
            raise ConstructorError(problem=" ".join(str(error).split()), problem_mark=node.start_mark) from error

    def _check(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """The number of nodes with aliases expanded. Raises `ConstructorError` for too many nodes, and for a key that occurs twice."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = MOST_NODES  # an alias of a node that contains it would never end
            inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + sum(self._check(part, sizes) for part in inside)
        if sizes[id(node)] > MOST_NODES:
            raise ConstructorError(problem=f"with its aliases written out it has more than {MOST_NODES:,} values", problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            first: dict[Any, yaml.Node] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):  # lists as keys are refused when constructed
                name = key.value if key.tag.endswith(":merge") else self.construct_object(key)  # a merge key has no value of its own
                if name in first:
                    raise ConstructorError(
                        problem=f"the key {brief(name)} stands twice, first on line {first[name].start_mark.line + 1}; rename or remove one",
                        problem_mark=key.start_mark,
                    )
                first[name] = key
        return sizes[id(node)]
