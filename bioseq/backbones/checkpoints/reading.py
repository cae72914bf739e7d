"""config.json and the vocabulary of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bioseq.errors import CheckpointError
from bioseq.specs.reading import parse


def read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"{file.parent} has no {file.name}.", hint="Give a Hugging Face model folder."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}.") from error


def parse_json(text: str, file: Path) -> dict[str, Any]:
    data = parse(text, str(file), error=CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is not a JSON object.")
    return data


def read_vocabulary(path: Path, raw: dict[str, Any]) -> tuple[list[str] | None, str]:
    """The tokens by id of vocab.txt, tokenizer.json, spiece.model or config.json's vocab_list, and which it was; None where none is
    there. Raises `CheckpointError`."""
    if (path / "vocab.txt").exists():
        tokens = [line.strip() for line in read_text(path / "vocab.txt").splitlines()]
        while tokens and not tokens[-1]:
            tokens.pop()
        return tokens, "vocab.txt"
    if (path / "tokenizer.json").exists():
        where = "tokenizer.json"
        data = parse_json(read_text(path / where), path / where)
        model, added = data.get("model"), data.get("added_tokens")
        table = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(table, list):  # of a unigram model: pairs of a token and its score
            return [str(pair[0]) if isinstance(pair, list) and pair else "" for pair in table], where
        ids = dict(table) if isinstance(table, dict) else {}
        for token in added if isinstance(added, list) else []:
            if isinstance(token, dict) and {"content", "id"} <= set(token):
                ids[token["content"]] = token["id"]
        if sorted(map(str, ids.values())) != sorted(map(str, range(len(ids)))):
            raise CheckpointError(f"{path / where}: the ids of its vocabulary do not follow each other.")
        return sorted(ids, key=lambda token: ids[token]), where
    if (path / "spiece.model").exists():
        return _sentencepiece(path / "spiece.model"), "spiece.model"
    if isinstance(raw.get("vocab_list"), list):
        return [str(t) for t in raw["vocab_list"]], "config.json's vocab_list"
    return None, ""


def _sentencepiece(file: Path) -> list[str]:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError(
            f"{file} is read by the package sentencepiece, which is not installed.",
            hint="pip install 'bioseq[families]'",
        ) from None
    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"cannot read {file}.") from error
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


def compare_vocabulary(tokens: list[str], expected: tuple[str, ...], where: str, family: str) -> None:
    """Raise `CheckpointError` at the first token that is not the expected one."""
    for i in range(max(len(tokens), len(expected))):
        found = repr(tokens[i]) if i < len(tokens) else "nothing"
        wanted = repr(expected[i]) if i < len(expected) else "nothing"
        if found != wanted:
            raise CheckpointError(
                f"{where} line {i + 1} is {found}, expected {wanted}."
                if where == "vocab.txt"
                else f"token {i} of {where} is {found}, expected {wanted}.",
                hint=f"The tokens must be {family}'s, in order.",
            )


class Reader:
    """The keys of a config.json, each checked; `family` is named in errors."""

    def __init__(self, raw: dict[str, Any], family: str):
        self.raw, self.family = raw, family

    def refuse(self, key: str, value: Any, need: str) -> CheckpointError:
        return CheckpointError(
            f"config.json has {key} {value!r}; {need}.",
            hint=f"bioseq knows {self.family} as it was published, and nothing else under its name.",
        )

    def get(self, key: str, default: Any, *kinds: type) -> Any:
        """The value, if it is of one of `kinds`."""
        value = self.raw.get(key, default)
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            raise self.refuse(key, value, f"{' or '.join(k.__name__ for k in kinds)} is needed")
        return value

    def only(self, **wanted: Any) -> None:
        """Refuse values other than these; a key that is absent has them."""
        for key, value in wanted.items():
            if self.raw.get(key) not in (None, value):
                raise self.refuse(key, self.raw[key], f"{self.family} has {value!r}")

    def plain_rotation(self) -> None:
        """Refuse rotary positions of another base, or scaled ones."""
        rope: dict[str, Any] = {"rope_theta": self.raw.get("rope_theta", 10000.0)}
        for key in ("rope_parameters", "rope_scaling"):
            rope.update(self.raw.get(key) or {})
        if rope["rope_theta"] != 10000.0:
            raise self.refuse("rope_theta", rope["rope_theta"], f"{self.family}'s is 10000")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise self.refuse(
                "rope_type", rope.get("rope_type", rope.get("type")), f"{self.family}'s is 'default'"
            )

    def sizes(self) -> dict[str, Any]:
        """Layers, widths and heads under `ModelConfig`'s names."""
        sizes = {
            "n_layers": self.get("num_hidden_layers", 12, int),
            "d_model": self.get("hidden_size", 768, int),
            "n_heads": self.get("num_attention_heads", 12, int),
            "d_ff": self.get("intermediate_size", 3072, int),
        }
        if (
            min(sizes.values()) < 1
            or sizes["d_model"] % sizes["n_heads"]
            or sizes["d_model"] // sizes["n_heads"] % 2
        ):
            raise self.refuse(
                "hidden_size",
                sizes["d_model"],
                f"it must be an even multiple of num_attention_heads ({sizes['n_heads']}), and all sizes positive",
            )
        return sizes
