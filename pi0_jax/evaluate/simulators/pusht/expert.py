"""An expert for PushT that sees the true state: it searches over two straight pushes in a row, and again after each.

The model of a push is quasi-static and without friction, which is what gym-pusht's damping makes of it: a disc that
would be inside the T moves it out along the contact's normal, as mass and inertia share the motion. Lengths are pixels,
poses (x, y, angle) those of the T's centre of mass.
"""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np

DISC = 15.0
"""Radius."""
CENTRE = np.array([0.0, 45.0])
"""Centre of mass, from the T's own origin."""
BARS = np.array([[-60, 60, -45, -15], [-15, 15, -15, 75]], float)
"""The two rectangles, from the centre of mass: x from and to, y from and to."""
OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float) - CENTRE
INERTIA = 2 * (120**2 + 30**2) / 12 + 2 * 15**2
"""Moment of inertia per mass: as gym-pusht adds it up, twice that of the upper bar about its edge."""
LOW, HIGH = 23.0, 488.0
"""Where the disc's centre may be, along either axis."""
GRID = 8.0
"""Distance of neighbouring cells of the map for travelling."""


def rotate(vectors: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """Vectors `[..., 2]` turned by angles, radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([c * vectors[..., 0] - s * vectors[..., 1], s * vectors[..., 0] + c * vectors[..., 1]], -1)


def of_origin(pose: np.ndarray) -> np.ndarray:
    """The pose of the centre of mass, from that of the T's origin."""
    return np.array([*(pose[:2] + rotate(CENTRE, pose[2])), pose[2]])


def corners(poses: np.ndarray) -> np.ndarray:
    """Corners of Ts, `[..., 3]` to `[..., 8, 2]`."""
    return poses[..., None, :2] + rotate(OUTLINE, poses[..., 2:3])


GOAL = of_origin(np.array([256.0, 256.0, np.pi / 4]))


def error(poses: np.ndarray) -> np.ndarray | np.floating:
    """Mean distance of the corners to where they are to be."""
    return np.linalg.norm(corners(poses) - corners(GOAL), axis=-1).mean(-1)


def nearest(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The T's nearest point to points in its frame, and the distance, negative inside; `[..., 2]`, `[...]`."""
    low, high = BARS[:, 0::2], BARS[:, 1::2]
    found = np.clip(points[..., None, :], low, high)
    inner = np.minimum(points[..., None, :] - low, high - points[..., None, :]).min(-1)
    distance = np.where(inner > 0, -inner, np.linalg.norm(points[..., None, :] - found, axis=-1))
    bar = distance.argmin(-1)[..., None]
    return np.take_along_axis(found, bar[..., None], -2)[..., 0, :], np.take_along_axis(distance, bar, -1)[..., 0]


def clearance(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Distance of points to the T."""
    return nearest(rotate(points - pose[:2], -pose[2]))[1]


def push(poses: np.ndarray, discs: np.ndarray, directions: np.ndarray, steps: int, size: float) -> np.ndarray:
    """Poses `[steps + 1, n, 3]` of Ts `[n, 3]` while discs at `[n, 2]` move straight on, `size` per step."""
    poses, result = poses.copy(), [poses.copy()]
    for step in range(1, steps + 1):
        place = discs + step * size * directions
        for _ in range(2):
            local = rotate(place - poses[:, :2], -poses[:, 2])
            touched, distance = nearest(local)
            normal = (touched - local) / np.maximum(np.linalg.norm(touched - local, axis=-1, keepdims=True), 1e-6)
            arm = touched[:, 0] * normal[:, 1] - touched[:, 1] * normal[:, 0]
            amount = np.maximum(DISC - distance, 0) / (1 + arm**2 / INERTIA)
            poses[:, :2] += amount[:, None] * rotate(normal, poses[:, 2])
            poses[:, 2] += amount * arm / INERTIA
        result.append(poses.copy())
    return np.stack(result)


def _contacts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the outline where a disc fits, their outward normals, and three directions of pushes there."""
    points, normals = [], []
    for a, b in zip(OUTLINE, np.roll(OUTLINE, -1, 0), strict=True):
        length = np.linalg.norm(b - a)
        along = (b - a) / length
        outward = np.array([along[1], -along[0]])
        for offset in np.linspace(5, length - 5, max(2, round((length - 10) / 9) + 1)):
            point = a + offset * along
            if nearest(point + (DISC + 1) * outward)[1] > DISC - 0.5:
                points.append(point)
                normals.append(outward)
    points, normals = np.array(points), np.array(normals)
    directions = -rotate(normals[:, None], np.radians([-20.0, 0.0, 20.0]))
    return np.repeat(points, 3, 0), np.repeat(normals, 3, 0), directions.reshape(-1, 2)


POINTS, NORMALS, DIRECTIONS = _contacts()


class Pushes:
    """All pushes from some poses `[m, 3]`: where discs `start` and their `directions` `[m, c, 2]`, the T's error after
    each step `[steps + 1, m, c]` (infinite beyond the board), and its `poses`."""

    def __init__(self, poses: np.ndarray, steps: int, size: float, straight: bool = False):
        chosen = slice(1, None, 3) if straight else slice(None)
        angle = poses[:, None, 2]
        self.start = poses[:, None, :2] + rotate(POINTS[chosen] + (DISC + 1) * NORMALS[chosen], angle)
        self.directions = rotate(np.broadcast_to(DIRECTIONS[chosen], self.start.shape), angle)
        shape, count = (steps + 1, *self.start.shape[:2]), self.start.shape[1]
        flat = (np.repeat(poses, count, 0), self.start.reshape(-1, 2), self.directions.reshape(-1, 2))
        self.poses = push(*flat, steps, size).reshape(*shape, 3)
        self.lengths = size * np.arange(steps + 1)
        discs = self.start + self.lengths[:, None, None, None] * self.directions
        inside = ((discs > LOW) & (discs < HIGH)).all(-1)
        where = corners(self.poses)
        inside &= ((where > 9) & (where < 502)).all((-1, -2))
        self.error = np.where(np.logical_and.accumulate(inside, 0), error(self.poses), np.inf)
        self.error[0] = np.inf


class Expert:
    """Where the disc is to go next, for one episode."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._targets: deque[np.ndarray] = deque()
        self._last, self._waited = np.full(2, np.nan), 0

    def act(self, disc: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """The next target of the disc `[2]`; `pose` is that of the T's origin."""
        if not self._targets or np.linalg.norm(self._targets[0] - disc) > 60:  # something moved the disc
            if self._waited < 3 and np.linalg.norm(disc - self._last) > 3:
                self._waited += 1
                return self._last
            self._plan(disc, of_origin(pose))
            self._waited = 0
        self._last = np.clip(self._targets.popleft(), LOW - 2, HIGH + 2)
        return self._last

    def _plan(self, disc: np.ndarray, pose: np.ndarray) -> None:
        """Fills the targets with the way to a push, and the push."""
        pose = np.array([*pose[:2], (pose[2] - GOAL[2] + np.pi) % (2 * np.pi) - np.pi + GOAL[2]])
        now = error(pose)
        fine = now < 10
        price = 0.004 if fine else 0.012  # error that a pixel of the disc's way is worth
        first = Pushes(pose[None], *((36, 1.0) if fine else (45, 3.0)))
        before = first.start[0] + 6.0 * rotate(NORMALS, pose[2])
        travel = Travel(disc, pose)
        cost = price * (np.minimum(travel.distance(before), 1500) + first.lengths[:, None])
        cost = np.where(((before > LOW - 1) & (before < HIGH + 1)).all(-1), cost, np.inf)
        value = first.error[:, 0] + cost
        heads = self._heads(value, (2, 4, 7, 11) if fine else (4, 9, 16, 25))
        if not heads:
            self._targets = deque([self._rng.uniform(LOW, HIGH, 2)])
            return
        steps, contacts = np.array(heads).T
        ends = first.start[0][contacts] + first.lengths[steps][:, None] * first.directions[0][contacts]
        second = Pushes(first.poses[steps, 0, contacts], *((16, 2.0) if fine else (26, 5.0)), straight=True)
        hop = 1.5 * np.linalg.norm(second.start - ends[:, None], axis=-1) + 30
        later = (second.error + price * (hop + second.lengths[:, None, None])).min((0, 2))
        total = cost[steps, contacts] + np.minimum(later, first.error[steps, 0, contacts])
        chance = np.exp(-(total - total.min()) / (2.0 * min(1.0, now / 30) + 1e-3))
        best = self._rng.choice(len(heads), p=chance / chance.sum())
        way = [disc, *travel.way(before[contacts[best]])]
        self._targets = deque(_walk(way, 16.0) + _walk([way[-1], ends[best]], 10.0 if now > 12 else 6.0))

    def _heads(self, value: np.ndarray, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
        """Steps and contact of the first pushes to look beyond: the six best, and some of the others."""
        options = {(int(value[:, c].argmin()), c) for c in range(value.shape[1])}
        options |= {(length, c) for length in lengths for c in range(value.shape[1])}
        found = sorted((option for option in options if np.isfinite(value[option])), key=lambda option: value[option])
        others = found[6:]
        picked = self._rng.choice(len(others), min(28, len(others)), replace=False) if others else ()
        return found[:6] + [others[i] for i in picked]


class Travel:
    """Shortest ways of the disc round the T, on a grid."""

    AXIS = np.arange(LOW, HIGH + 1e-6, GRID)
    CELLS = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), -1).reshape(-1, 2)

    def __init__(self, disc: np.ndarray, pose: np.ndarray):
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import dijkstra

        self._disc, self._pose = disc, pose
        free = (clearance(self.CELLS, pose) > DISC + 1.5).reshape(len(self.AXIS), -1)
        number = np.arange(len(self.CELLS)).reshape(free.shape)
        edges = []
        for a, b in (
            (np.s_[:-1, :], np.s_[1:, :]),
            (np.s_[:, :-1], np.s_[:, 1:]),
            (np.s_[:-1, :-1], np.s_[1:, 1:]),
            (np.s_[:-1, 1:], np.s_[1:, :-1]),
        ):
            one, other = number[a].ravel(), number[b].ravel()
            length = np.linalg.norm(self.CELLS[one] - self.CELLS[other], axis=-1)
            edges.append((one, other, length * np.where((free[a] & free[b]).ravel(), 1.0, 30.0)))
        one, other, length = (np.concatenate(each) for each in zip(*edges, strict=True))
        graph = csr_matrix((length, (one, other)), shape=(len(self.CELLS),) * 2)
        source = self._cell(disc)
        self._length, self._before = dijkstra(graph, directed=False, indices=source, return_predecessors=True)

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Length of the way to points `[n, 2]`; thirty times as much where it touches the T."""
        cells = np.array([self._cell(point) for point in points])
        return self._length[cells] + np.linalg.norm(self.CELLS[cells] - points, axis=-1)

    def way(self, point: np.ndarray) -> list[np.ndarray]:
        """Corners of the way to a point, pulled straight."""
        cell, cells = self._cell(point), []
        while cell >= 0:
            cells.append(self.CELLS[cell])
            cell = self._before[cell]
        points, corner, result = [self._disc, *cells[::-1], point], 0, []
        while corner < len(points) - 1:
            corner = next(
                i
                for i in range(len(points) - 1, corner, -1)
                if i == corner + 1 or self._clear(points[corner], points[i])
            )
            result.append(points[corner])
        return result

    def _clear(self, a: np.ndarray, b: np.ndarray) -> bool:
        line = a + np.linspace(0, 1, max(2, int(np.linalg.norm(b - a) / 3)))[:, None] * (b - a)
        distance = clearance(line, self._pose)
        return bool((distance[1:-1] >= min(DISC + 1.5, max(distance[-1], 0)) - 0.3).all())

    def _cell(self, point: np.ndarray) -> int:
        return int(np.linalg.norm(self.CELLS - point, axis=-1).argmin())


def _walk(corners_of_way: list[np.ndarray], speed: float) -> list[np.ndarray]:
    """Targets along a way, at most `speed` from one to the next."""
    targets = []
    for a, b in itertools.pairwise(corners_of_way):
        count = max(1, int(np.ceil(np.linalg.norm(b - a) / speed)))
        targets += [a + (b - a) * i / count for i in range(1, count + 1)]
    return targets
