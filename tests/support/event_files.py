"""What TensorBoard would read of a folder of event files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def events(folder: Path) -> list[Any]:
    """Events of all files in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, payload, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event()
            event.ParseFromString(data[at + 12 : at + 12 + size])
            found.append(event)
            at += 16 + size
    return found


def scalars(found: Sequence[Any]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: a session that starts at a step hides what came before at that step or later."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for event in found:
        if event.WhichOneof("what") == "session_log":
            shown = {tag: [point for point in points if point[0] < event.step] for tag, points in shown.items()}
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                shown.setdefault(value.tag, []).append((event.step, round(value.simple_value, 6)))
    return shown
