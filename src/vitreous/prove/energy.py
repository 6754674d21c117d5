"""Energy that the processor says it took: the counters of Intel's RAPL, which Linux shows for AMD's processors too."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Counters:
    """Joules of all processor packages together, whatever runs on them, since this was made. `there`: whether any can be read."""

    def __init__(self, root: Path | None = None) -> None:
        self.joules, self.zones = 0.0, dict[Path, tuple[int, int]]()
        for zone in sorted((root or POWERCAP).glob("*-rapl:*")):
            try:
                if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                    self.zones[zone / "energy_uj"] = (
                        self._now(zone / "energy_uj"),
                        int((zone / "max_energy_range_uj").read_text()),
                    )
            except (OSError, ValueError):
                continue  # readable by root alone, as Linux has it since 2020

    @property
    def there(self) -> bool:
        return bool(self.zones)

    def __call__(self) -> float:
        """Joules until now. A counter that began again from 0 is told by having fallen."""
        for path, (last, most) in self.zones.items():
            now = self._now(path)
            self.joules += (now - last + (most if now < last else 0)) / 1e6
            self.zones[path] = (now, most)
        return self.joules

    @staticmethod
    def _now(path: Path) -> int:
        return int(path.read_text())
