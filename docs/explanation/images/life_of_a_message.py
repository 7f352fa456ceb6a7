"""Draws life-of-a-message.svg beside itself: python docs/explanation/images/life_of_a_message.py

The drawing has a background of its own, and colours for light and for dark pages.
"""

from pathlib import Path

WIDTH, HEIGHT = 880, 430
STYLE = """
  .page { fill: #ffffff; }
  .side { fill: #f3f4f6; stroke: #9ca3af; }
  .arena { fill: #e0f2ec; stroke: #2f8f6f; }
  .block { fill: #8fd0b9; stroke: #2f8f6f; }
  .object { fill: #dbe7fb; stroke: #4a72b8; }
  .pipe { fill: none; stroke: #b45309; stroke-width: 2; }
  .copy { fill: none; stroke: #2f8f6f; stroke-width: 3; }
  .return { fill: none; stroke: #2f8f6f; stroke-width: 2; stroke-dasharray: 6 4; }
  .tip { fill: #2f8f6f; }
  .pipetip { fill: #b45309; }
  text { font: 14px system-ui, -apple-system, "DejaVu Sans", sans-serif; fill: #1f2937; }
  .head { font-weight: bold; }
  .small { font-size: 12px; fill: #4b5563; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #14181e; }
    .side { fill: #1f2630; stroke: #6b7280; }
    .arena { fill: #123329; stroke: #4fb894; }
    .block { fill: #1f6b53; stroke: #4fb894; }
    .object { fill: #1e3358; stroke: #7da2e3; }
    .pipe { stroke: #f0a860; }
    .copy, .return { stroke: #4fb894; }
    .tip { fill: #4fb894; }
    .pipetip { fill: #f0a860; }
    text { fill: #e5e7eb; }
    .small { fill: #b6bdc8; }
  }
"""


def box(style, x, y, width, height, *lines, at=None):
    """Return a rectangle, and lines of text in its middle or from the height `at` on."""
    found = [
        f'<rect class="{style}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>',
    ]
    top = y + height / 2 - 9 * (len(lines) - 1) + 5 if at is None else at
    for number, line in enumerate(lines):
        kind = ' class="head"' if number == 0 and at is not None else ""
        found.append(text(x + width / 2, top + 18 * number, line, kind))
    return "\n".join(found)


def text(x, y, line, kind=' class="small"', anchor="middle"):
    return f'<text{kind} x="{x}" y="{y}" text-anchor="{anchor}">{line}</text>'


def arrow(style, path, tip):
    return f'<path class="{style}" d="{path}" marker-end="url(#{tip})"/>'


def marker(name, style):
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" '
        f'markerHeight="9" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path class="{style}" d="M0 0 L10 5 L0 10 z"/></marker>'
    )


def drawing():
    parts = [
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        box("side", 20, 20, 230, 250, "sender", at=45),
        box("side", 630, 20, 230, 250, "receiver", at=45),
        box("arena", 20, 320, 840, 90, "arena: memory that both have mapped", at=342),
        box("object", 45, 65, 180, 46, "object with large arrays"),
        box("object", 45, 165, 180, 46, "stream + buffers"),
        box("object", 655, 65, 180, 46, "object; its arrays", "are the block"),
        box("object", 655, 165, 180, 46, "envelope"),
        box("block", 60, 356, 190, 40, "LEASED"),
        box("block", 345, 356, 190, 40, "IN FLIGHT"),
        box("block", 630, 356, 190, 40, "HELD"),
        arrow("pipe", "M135 111 V163", "pipetip"),
        text(145, 141, "1 taken apart", anchor="start"),
        arrow("copy", "M100 211 V354", "tip"),
        text(110, 236, "2 each buffer is", anchor="start"),
        text(110, 252, "copied once", anchor="start"),
        arrow("copy", "M250 376 H343", "tip"),
        text(297, 368, "3 sealed"),
        arrow("pipe", "M225 188 H653", "pipetip"),
        text(440, 178, "4 an envelope of a few hundred bytes", kind=""),
        text(440, 208, "through the pipe: it names the block"),
        arrow("copy", "M535 376 H628", "tip"),
        text(582, 368, "5 claimed"),
        arrow("pipe", "M745 165 V113", "pipetip"),
        text(755, 143, "6 loaded", anchor="start"),
        arrow("copy", "M640 356 V118 Q640 88 653 88", "tip"),
        text(650, 243, "nothing is copied", anchor="start"),
        arrow("return", "M725 396 V404 Q725 418 700 418 H180 Q155 418 155 404 V398", "tip"),
        text(
            440,
            300,
            "7 when the last array is gone, the block is free, and warm for the next message",
        ),
    ]
    inside = "\n".join(parts)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" \
height="{HEIGHT}" role="img" aria-labelledby="title">
<title id="title">The life of a message: the sender copies each buffer once into the arena, an \
envelope goes through the pipe, the receiver's arrays are the block, and the block is used again.\
</title>
<style>{STYLE}</style>
<defs>{marker("tip", "tip")}{marker("pipetip", "pipetip")}</defs>
{inside}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("life-of-a-message.svg").write_text(drawing())
