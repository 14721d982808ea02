"""Values of variables that shells, YAML or programs on the way could change."""

from __future__ import annotations

VALUES = {
    "PLAIN": "plain",
    "EMPTY": "",
    "WORDS": " two  words ",
    "SHELL": "$HOME `id` \"quoted\" back\\slash 'single' $(id) !! ~ *",
    "PERCENT": "50% %h %n %%; ls & # no comment",
    "LINES": "two\nlines\r\n\tand one more\n",
    # All bytes from 0x80 on that UTF-8 has, among them those that shells have used for marks of their own.
    "LETTERS": "".join(map(chr, [*range(0x80, 0x800, 7), *range(0x800, 0xD800, 997), 0x1F600])),
    "BYTES": "\udcff\udc81",
}
