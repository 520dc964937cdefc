"""Write the demo model as a GGUF file of unquantized weights, which is what OpenVINO GenAI reads without torch.

The file that `make` fetches holds Q4_1 and Q8_0 blocks. Every other engine gets them dequantized to float32; OpenVINO
would compute with the quantized blocks, which is other arithmetic than theirs. So the blocks are dequantized here by
the same package, and written as float16: the only unquantized type that OpenVINO's GGUF reader keeps as it is.
`python -m tests.bench.weights FROM.gguf TO.gguf`.
"""

import os
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize


def write_unquantized(source: Path, target: Path, dtype: str = "float16") -> None:
    """Write `source` to `target` with every matrix as `dtype`; metadata, tokenizer and vectors stay as they are."""
    reader = GGUFReader(source)
    aside = target.with_suffix(".part")
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(aside, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.quantization_version"):
            continue
        kind = field.types[0]
        value = field.contents()
        if name == "general.file_type":
            value = int(LlamaFileType.MOSTLY_F16 if dtype == "float16" else LlamaFileType.ALL_F32)
        writer.add_key_value(name, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = np.asarray(tensor.data)
        if tensor.tensor_type != GGMLQuantizationType.F32:
            values = dequantize(values, tensor.tensor_type)
        if values.ndim > 1:
            values = values.astype(dtype)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(aside, target)


if __name__ == "__main__":
    write_unquantized(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
