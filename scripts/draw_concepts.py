"""Draw the pictures of docs/concepts.md: `python scripts/draw_concepts.py` writes docs/images/concept-*.svg.

The pictures are plain SVG with text, so they are small, sharp and searchable; a test compares them with this script.
"""

import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH = 760
INK, MUTED, LINE = "#1f2430", "#667085", "#c9d0da"
CONTEXT, SUPERVISED, CONTROL, EMPTY = "#eef1f5", "#c9eed9", "#e2dcfa", "#ffffff"
PART_COLORS = {"weights": "#bcd7f7", "gradients": "#f9d9a8", "optimizer": "#c9eed9"}


class Drawing:
    """Shapes of one picture; coordinates are pixels from the upper left corner."""

    def __init__(self, title: str, height: int) -> None:
        self.height = height
        self.parts = [f"<title>{escape(title)}</title>"]
        self.box(0.5, 0.5, WIDTH - 1, height - 1, "#ffffff", LINE, radius=10)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, line: str = LINE, radius: int = 4
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}" '
            f'stroke="{line}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 14,
        color: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def cell(self, x: float, y: float, width: float, words: str, fill: str, height: float = 30, size: int = 14) -> None:
        """Draw a box with a text in its middle."""
        self.box(x, y, width, height, fill)
        self.text(x + width / 2, y + height / 2 + size * 0.35, words, size, anchor="middle")

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{MUTED}" stroke-width="1.5" '
            'marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        tip = (
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
            f'<path d="M0,0 L6,3 L0,6" fill="none" stroke="{MUTED}"/></marker></defs>'
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" font-family="system-ui, sans-serif" role="img">'
        )
        return "\n".join([head, tip, *self.parts, "</svg>"]) + "\n"


def legend(drawing: Drawing, y: float, entries: Sequence[tuple[str, str]]) -> None:
    """Draw colours with their meaning in one line."""
    x = 24.0
    for color, words in entries:
        drawing.box(x, y, 16, 16, color)
        drawing.text(x + 24, y + 13, words, 13, MUTED)
        x += 44 + 7.0 * len(words)


def mask() -> Drawing:
    drawing = Drawing("The mask: which tokens of a row count in the loss", 208)
    tokens = ["<s>", "[INST]", "How", "long", "?", "[/INST]", "Two", "years", ".", "</s>"]
    widths = [46, 66, 56, 56, 40, 74, 56, 62, 40, 56]
    drawing.text(24, 34, "input_ids", 13, MUTED, bold=True)
    drawing.text(24, 104, "labels", 13, MUTED, bold=True)
    x = 112.0
    for number, (token, width) in enumerate(zip(tokens, widths, strict=True)):
        supervised = number >= 6
        is_control = token.startswith(("<", "["))
        drawing.cell(x, 14, width, token, CONTROL if is_control else CONTEXT)
        drawing.cell(x, 84, width, token if supervised else "-100", SUPERVISED if supervised else EMPTY)
        drawing.arrow(x + width / 2, 48, x + width / 2, 80)
        x += width + 6
    drawing.text(
        24,
        150,
        "Loss: the mean of the cross-entropies of the supervised tokens, here of 4. The terminator </s> is one.",
    )
    legend(
        drawing,
        172,
        [(CONTROL, "control token"), (CONTEXT, "text"), (SUPERVISED, "supervised"), (EMPTY, "not supervised")],
    )
    return drawing


def template() -> Drawing:
    drawing = Drawing("The template: messages become one row, and the prompt is the beginning of that row", 262)
    messages = [("user", "How long does a chain last?", CONTEXT), ("assistant", "Two years.", SUPERVISED)]
    for number, (role, words, color) in enumerate(messages):
        y = 22 + 44 * number
        drawing.box(24, y, 286, 34, color)
        drawing.text(36, y + 22, f"{role}:", 13, MUTED)
        drawing.text(112, y + 22, words, 13)
    drawing.arrow(322, 60, 398, 60)
    drawing.text(360, 48, "template", 13, MUTED, anchor="middle")
    drawing.text(412, 48, "One module writes the row for training,", 13)
    drawing.text(412, 68, "the prompt for evaluation, and the", 13)
    drawing.text(412, 88, "prompt for chat and the server.", 13)
    segments = [
        ("<s>", 44, CONTROL), ("[INST]", 68, CONTROL), ("How long does a chain last?", 232, CONTEXT),
        ("[/INST]", 74, CONTROL), ("Two years.", 110, SUPERVISED), ("</s>", 54, SUPERVISED),
    ]  # fmt: skip
    for y, count, name in ((128, 6, "training row"), (190, 4, "prompt")):
        drawing.text(24, y + 20, name, 13, MUTED, bold=True)
        x = 122.0
        for words, width, color in segments[:count]:
            drawing.cell(x, y, width, words, color)
            x += width + 4
    drawing.text(560, 210, "the model continues here", 13, MUTED)
    drawing.text(24, 244, "The prompt is, id for id, the beginning of the training row.")
    return drawing


def padding_free() -> Drawing:
    drawing = Drawing(
        "Padding-free rows: conversations one after another, each with positions and attention of its own", 330
    )
    lengths = (8, 3, 5)
    colors = (PART_COLORS["weights"], PART_COLORS["gradients"], PART_COLORS["optimizer"])
    drawing.text(24, 34, "Padded batch: 24 places for 16 tokens", bold=True)
    for row, (length, color) in enumerate(zip(lengths, colors, strict=True)):
        for column in range(8):
            drawing.box(24 + 30 * column, 50 + 32 * row, 26, 26, color if column < length else EMPTY)
    drawing.text(24, 196, "Padding-free row: 16 places for 16 tokens", bold=True)
    x = 24.0
    for length, color in zip(lengths, colors, strict=True):
        for position in range(length):
            drawing.cell(x, 212, 26, str(position), color, height=26, size=12)
            x += 28
    drawing.text(24, 262, "The numbers are the position ids: they restart with each conversation.", 13, MUTED)
    drawing.text(500, 34, "Attention of the row", bold=True)
    start, size = 0, 13
    for length, color in zip(lengths, colors, strict=True):
        for row in range(length):
            for column in range(row + 1):
                drawing.box(500 + size * (start + column), 50 + size * (start + row), size, size, color, radius=0)
        start += length
    drawing.box(500, 50, size * 16, size * 16, "none", radius=0)
    drawing.text(500, 284, "A token attends to earlier tokens", 13, MUTED)
    drawing.text(500, 302, "of its own conversation only.", 13, MUTED)
    drawing.text(24, 302, "Same loss, same gradients, and no work on padding.")
    return drawing


def zero_stages() -> Drawing:
    drawing = Drawing("What each process holds under vanilla and the ZeRO stages", 326)
    parts = list(PART_COLORS)
    for process in range(2):
        drawing.text(150 + 300 * process, 34, f"process {process}", bold=True)
    for row, (name, sharded) in enumerate((("vanilla", 0), ("zero1", 1), ("zero2", 2), ("zero3", 3))):
        y = 54 + 56 * row
        drawing.text(24, y + 25, name, bold=True)
        for process in range(2):
            for column, part in enumerate(parts):
                x = 150 + 300 * process + 92 * column
                split = column >= len(parts) - sharded
                drawing.box(x, y, 84, 38, EMPTY)
                if split:
                    drawing.box(x + 42 * process, y, 42, 38, PART_COLORS[part])
                else:
                    drawing.box(x, y, 84, 38, PART_COLORS[part])
                drawing.text(x + 42, y + 24, part, 12, anchor="middle")
    drawing.text(
        24,
        296,
        "A half-filled box: the process holds its share only, and the processes send each other what they lack.",
        13,
    )
    drawing.text(
        24, 314, "The optimizer steps are the same in every row; memory, time and communication differ.", 13, MUTED
    )
    return drawing


def trajectory() -> Drawing:
    drawing = Drawing("One trajectory: the loss of a step does not depend on how its batch is split", 268)
    drawing.text(
        24, 34, "A step of two conversations. A: 10 supervised tokens, summed loss 20. B: 2 tokens, summed loss 8."
    )
    layouts = [
        ("one row", (("A and B", "20 + 8", "10 + 2"),)),
        ("micro-steps or processes", (("A", "20", "10"), ("B", "8", "2"))),
    ]
    for row, (name, forwards) in enumerate(layouts):
        y = 54 + 62 * row
        drawing.text(24, y + 27, name, 13, MUTED, bold=True)
        width = 330 / len(forwards) - 6
        for column, (words, loss, tokens) in enumerate(forwards):
            x = 230 + column * (width + 6)
            drawing.box(x, y, width, 44, PART_COLORS["weights"])
            drawing.text(x + width / 2, y + 18, words, 13, anchor="middle", bold=True)
            drawing.text(x + width / 2, y + 36, f"{loss} over {tokens} tokens", 12, anchor="middle")
        drawing.arrow(566, y + 22, 602, y + 22)
        drawing.text(614, y + 27, "28 / 12 = 2.33", 15, bold=True)
    drawing.box(24, 184, WIDTH - 48, 66, CONTEXT)
    drawing.text(
        40,
        210,
        "MiniSFT divides the sum of all losses by the number of all supervised tokens of the step: always 2.33.",
        13,
    )
    drawing.text(
        40,
        234,
        "A mean of means would be (2.0 + 4.0) / 2 = 3.0 for the second layout: another step for another split.",
        13,
        MUTED,
    )
    return drawing


PICTURES: dict[str, Callable[[], Drawing]] = {
    "mask": mask, "template": template, "padding-free": padding_free, "zero": zero_stages, "trajectory": trajectory,
}  # fmt: skip


def main() -> int:
    for name, draw in PICTURES.items():
        (IMAGES / f"concept-{name}.svg").write_text(draw().svg(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
