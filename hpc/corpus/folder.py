"""The corpus files of a folder: what `datasets` has saved there, or files of one kind."""

import json
from pathlib import Path

from hpc.corpus.detect import named_format
from hpc.corpus.errors import CorpusError


def files_in(folder: Path) -> list[Path]:
    """Return the corpus files of a folder, in order; raise `CorpusError` where it is not clear which they are."""
    saved = saved_files(folder)
    if saved is not None:
        return saved
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        kind = named_format(path.name)
        if kind and not path.name.startswith((".", "_")) and path.is_file():
            kinds.setdefault("jsonl" if kind == "json" else kind, []).append(path)
    if len(kinds) == 1:
        [files] = kinds.values()
        return files
    if kinds:
        first = next(iter(kinds.values()))[0]
        raise CorpusError(
            f'corpus "{folder}" is a folder of {" and ".join(sorted(kinds))} files; say which, for example '
            f'"{folder}/*{first.suffix}"'
        )
    inner = next((path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] not in "._"), None)
    hint = f'"{inner}"' if inner else f'"{folder}/*"'
    raise CorpusError(
        f'corpus "{folder}" is a folder without a file that is called .jsonl, .json, .csv, .tsv, .txt, .parquet or '
        f".arrow; name the files, for example {hint}"
    )


def saved_files(folder: Path) -> list[Path] | None:
    """Return the files of a data set that `save_to_disk` has written, in order; None for another folder."""
    try:
        if (folder / "dataset_dict.json").exists():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            raise CorpusError(
                f'corpus "{folder}" has the splits {", ".join(splits)}; say which: "{folder / splits[0]}"'
            )
        if not (folder / "state.json").exists():
            return None
        names = [file["filename"] for file in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CorpusError(f'corpus "{folder}" is no whole data set ({error}); save it again') from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CorpusError(f'corpus "{folder}" is no whole data set: {missing[0]} is missing; save it again')
    return [folder / name for name in names]
