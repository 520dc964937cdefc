"""What is clearly no JSONL is refused as a whole with the way out; what may be is read, however broken."""

import bz2
import gzip
import json
import lzma

import pytest

from hpc.corpus.detect import HEAD_BYTES, foreign

ROWS = [{"id": index, "prompt": f"prompt {index}, and more"} for index in range(3)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
BATCH = json.dumps({"custom_id": "q", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}) + "\n"


@pytest.mark.parametrize(
    ("data", "what", "way_out"),
    [
        (gzip.compress(JSONL.encode(), mtime=0), "gzip", "gunzip -c F | scattergen run --corpus -"),
        (b"\x28\xb5\x2f\xfd\x04\x58" + b"\x91" * 50, "zstd", "zstd -dc F | scattergen run --corpus -"),
        (bz2.compress(JSONL.encode()), "bzip2", "bunzip2 -c F | scattergen run --corpus -"),
        (lzma.compress(JSONL.encode()), "xz", "xz -dc F | scattergen run --corpus -"),
        (b"PAR1\x15\x04\x15", "Parquet", "to_json"),
        (b"ARROW1\0\0", "Arrow", "to_json"),
        (b"PK\x03\x04\x14\0", "zip", "to_json"),
        (b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000", "tar", "unpack it"),
        (JSONL.encode("utf-16"), "UTF-16", "iconv -f UTF-16 -t UTF-8 F"),
        (JSONL.encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE -t UTF-8 F"),
        (JSONL.encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE -t UTF-8 F"),
        (JSONL.encode("utf-32"), "UTF-32", "iconv -f UTF-32 -t UTF-8 F"),
        (json.dumps(ROWS).encode(), "a JSON array", "jq -c '.[]' F"),
        (json.dumps(ROWS, indent=2).encode(), "a JSON array", "jq -c '.[]' F"),
        (b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n", "a JSON array", "jq -c '.[]' F"),
        (b"[" + b"\n,".join(json.dumps(row).encode() for row in ROWS) + b"]", "a JSON array", "jq -c '.[]' F"),
        (json.dumps(ROWS * 1000).encode()[:HEAD_BYTES], "a JSON array", "jq -c '.[]' F"),
        (json.dumps(ROWS * 1000, indent=1).encode()[:HEAD_BYTES], "a JSON array", "jq -c '.[]' F"),
        (json.dumps({"rows": ROWS}, indent=1).encode(), "over several lines", "jq -c . F"),
        ("".join(json.dumps(row, indent=1) for row in ROWS).encode(), "over several lines", "jq -c . F"),
        (b"[1, 2]\n[3, 4]\n", "no objects", "one object on each line"),
        (b"id,prompt\n0,cat\n1,dog\n", "CSV", "one object on each line"),
        (b"id;prompt\n0;cat\n", "CSV", "one object on each line"),
        (b"id\tprompt\n0\tcat\n", "TSV", "one object on each line"),
        (b"What is a cat?\nWhat is a dog?\n", "plain text", "one object on each line"),
        (b"\xef\xbb\xbfWhat is a cat?\n", "plain text", "one object on each line"),
        (b'"What is a cat?"\n"What is a dog?"\n', "plain text", "one object on each line"),
        (b"x" * HEAD_BYTES, "plain text", "one object on each line"),
        (BATCH.encode() * 2, "batch file of OpenAI's API", "jq -c"),
    ],
)
def test_another_format_is_named_with_the_way_out(data: bytes, what: str, way_out: str) -> None:
    found = foreign(data[:HEAD_BYTES], "F")
    assert found is not None
    assert what in found
    assert way_out in found


@pytest.mark.parametrize(
    "text",
    [
        JSONL,
        "\ufeff" + JSONL,
        "\n \r\n" + JSONL,
        JSONL.replace("\n", "\r\n"),
        JSONL.rstrip("\n"),
        "",
        "\n\n",
        "{",
        "{}",
        '{"prompt": "cut of\n',
        '{"prompt": "cut of\n' + JSONL,
        "not JSON\n" + JSONL,
        "id,prompt\n" + JSONL,
        "5\n" + JSONL,
        "[1]\n" + JSONL,
        '[{"prompt": "a"}]\n' + JSONL,
        '[{"prompt": "a"},\n' + JSONL,
        '[{"a": 1}\n' + JSONL,
        "[\n" + JSONL,
        "{\n" + JSONL,
        '{"prompt": "a", "id": 5.0}\n' * 3,
        BATCH + JSONL,
        '{"prompt": "a", "custom_id": 5, "body": "kept as meta"}\n',
        json.dumps({"prompt": "x" * 2 * HEAD_BYTES}),
        json.dumps({"prompt": "é" * HEAD_BYTES}, ensure_ascii=False),
        JSONL + "x" * HEAD_BYTES,
    ],
)
def test_what_may_be_jsonl_is_read(text: str) -> None:
    assert foreign(text.encode()[:HEAD_BYTES], "F") is None
