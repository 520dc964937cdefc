"""The date in a chat template, fixed: prompts must be the same tomorrow, or a run could not go on."""

import json
import string
from datetime import datetime
from pathlib import Path

NAME = "strftime_now"
"""The function by which templates ask for the date. transformers' own looks at the clock, and cannot be handed in."""

_HIDDEN = "\\u0000"
"""Stands for a doubled percent sign while the others are looked for."""


def fix_date(template: str, date: str) -> str:
    """Return a template in which `strftime_now` is a macro that knows one moment, `date` in ISO format.

    The macro knows every directive of strftime, with the flags that the C library has; nothing else is changed, and
    a template that does not ask for the date stays as it is.
    """
    if NAME not in template:
        return template
    moment = datetime.fromisoformat(date)
    values = {
        flag + letter: moment.strftime(f"%{flag}{letter}")
        for flag in ("", "-", "_", "0", "^", "#")
        for letter in string.ascii_letters
    }
    table = json.dumps({key: value for key, value in values.items() if value != f"%{key}"})
    back = f"|replace('{_HIDDEN}', '%')"
    # In one line, whose end is taken off (trim_blocks): what follows is at the beginning of a line, as it was.
    return (
        f"{{% macro {NAME}(format) %}}{{% set values = {table} %}}"
        f"{{% set parts = format.replace('%%', '{_HIDDEN}').split('%') %}}{{{{ parts[0]{back} }}}}"
        "{% for part in parts[1:] %}"
        f"{{% if part[:2] in values %}}{{{{ values[part[:2]] + part[2:]{back} }}}}"
        f"{{% elif part[:1] in values %}}{{{{ values[part[:1]] + part[1:]{back} }}}}"
        f"{{% else %}}{{{{ '%' + part{back} }}}}{{% endif %}}"
        "{% endfor %}{% endmacro %}\n" + template
    )


def tells_date(folder: Path, template: str = "") -> bool:
    """Say whether a chat template of a model directory asks for the date; of a file in their place, if one is named."""
    files = (
        [Path(template)]
        if template
        else [
            folder / "tokenizer_config.json",
            *folder.glob("chat_template*"),
            *folder.glob("*chat_templates/*"),
        ]
    )
    return any(file.is_file() and NAME.encode() in file.read_bytes() for file in files)
