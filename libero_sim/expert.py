"""
A scripted expert for libero_spatial: it takes the black bowl by its rim and sets it down on the plate.

    for action in expert(sim): sim.step(action)

It knows where everything is (a policy does not), and acts through the same seven numbers a step as a policy. For
checking the evaluation, and for making demonstrations.

Vectors are in metres and in the world's frame (z up); R (3, 3) turns the hand's frame into it; yaw is in radians.
"""

from collections.abc import Iterator

import numpy as np

from libero_sim.simulator import Simulator

RIM = 0.047  # from the bowl's middle to where the fingers straddle its wall
OPEN, CLOSE = -1.0, 1.0
PLACED = "place_it_on_the_plate"


def expert(sim: Simulator) -> Iterator[np.ndarray]:
    """Actions of the simulator, endlessly; each is to be executed before the next is asked for."""
    if PLACED not in sim.env.env.bddl_file_name:
        raise ValueError(f"the expert only knows libero_spatial, not {sim.suite}: {sim.instruction!r}")
    hand = Hand(sim, *sim.env.obj_of_interest[:2])
    while True:
        for yaw in hand.yaws()[:6]:
            yield from hand.carry(yaw)
            yield from hand.go(hand.place() + [0, 0, 0.12], hand.turn(), OPEN, tol=0.03, steps=20)


class Hand:
    def __init__(self, sim: Simulator, bowl: str, plate: str):
        self.sim, self.bowl, self.plate = sim, f"{bowl}_pos", f"{plate}_pos"
        self.start = self.turn()  # fingers down

    def place(self) -> np.ndarray:
        return np.array(self.sim.obs["robot0_eef_pos"])

    def turn(self) -> np.ndarray:
        return matrix(self.sim.obs["robot0_eef_quat"])

    def of(self, name: str) -> np.ndarray:
        return np.array(self.sim.obs[name])

    def go(self, target, R, grip, tol=0.008, turn_tol=0.06, steps=60, gain=1.0) -> Iterator[np.ndarray]:
        """Towards a point (or what `target()` says at each step) until it is near, at most so many steps."""
        for _ in range(steps):
            point = target() if callable(target) else target
            move = (point - self.place()) * gain / 0.05
            yield np.concatenate([move, rotation_vector(R @ self.turn().T) / 0.5, [grip]]).clip(-1, 1)
            left = np.linalg.norm(point - self.place()), np.linalg.norm(rotation_vector(R @ self.turn().T))
            if left[0] < tol and left[1] < turn_tol:
                return

    def hold(self, target, R, grip, steps) -> Iterator[np.ndarray]:
        return self.go(target, R, grip, tol=0, steps=steps)

    def close(self, target, R, steps=16) -> Iterator[np.ndarray]:
        """Until the fingers stand still: no step longer, or a policy that learns from it would learn to wait."""
        before = None
        for _ in range(steps):
            fingers = self.of("robot0_gripper_qpos")
            if before is not None and np.abs(fingers - before).max() < 2e-4 and np.ptp(fingers) < 0.06:
                return
            before = fingers
            yield from self.hold(target, R, CLOSE, 1)

    def carry(self, yaw: float) -> Iterator[np.ndarray]:
        """One attempt: pinch the rim in direction `yaw` from the bowl's middle, lift, put down. Ends where it fails."""
        bowl = self.of(self.bowl)
        outward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        R = straddle(self.start, outward)
        in_drawer, high = 1.0 < bowl[2] < 1.1, bowl[2] > 1.1
        grasp = bowl + RIM * outward + [0, 0, 0.032 if in_drawer else 0.045]
        safe = max(self.place()[2], grasp[2] + 0.10)
        yield from self.go(np.append(self.place()[:2], safe), R, OPEN, tol=0.03, turn_tol=0.3, steps=25)
        yield from self.go(np.append(grasp[:2], safe), R, OPEN, tol=0.015, turn_tol=0.08, steps=40)
        yield from self.go(grasp + [0, 0, 0.06], R, OPEN, tol=0.01, steps=25)
        if self.place()[2] - grasp[2] > 0.10:
            return
        yield from self.go(grasp, R, OPEN, tol=0.006, steps=40 if in_drawer else 22, gain=0.8)
        if self.place()[2] - grasp[2] > (0.035 if high else 0.018):
            return  # something is in the way
        yield from self.close(grasp, R)
        yield from self.go(self.place() + [0, 0, 0.20], R, CLOSE, tol=0.03, steps=30, gain=0.6)
        if self.of(self.bowl)[2] < bowl[2] + 0.05:
            return  # it slipped
        plate = self.of(self.plate)
        below = (self.of(self.bowl) - self.place())[2]  # the bowl hangs that far under the hand

        def above_plate(height: float):
            return lambda: np.append((plate - self.of(self.bowl) + self.place())[:2], height)

        height = max(self.place()[2], plate[2] + 0.20 - below)
        yield from self.go(above_plate(height), R, CLOSE, tol=0.015, turn_tol=0.15, steps=50, gain=0.65)
        below = (self.of(self.bowl) - self.place())[2]
        height = plate[2] + 0.012 - below
        yield from self.go(above_plate(height), R, CLOSE, tol=0.008, turn_tol=0.15, steps=35, gain=0.6)
        yield from self.hold(self.place() - [0, 0, 0.01], R, CLOSE, 3)
        yield from self.hold(self.place(), R, OPEN, 10)
        yield from self.go(self.place() + [0, 0, 0.15], R, OPEN, tol=0.02, steps=30)
        yield from self.hold(self.place(), R, OPEN, 5)

    def yaws(self) -> list[float]:
        """Where to pinch, best first: across the robot's view (no turn of the wrist), away from everything else."""
        bowl, obs, body = self.of(self.bowl), self.sim.obs, self.sim.env.sim.data
        if 1.0 < bowl[2] < 1.1:
            return np.deg2rad([180, 120, 150, 0, -30, 90]).tolist()  # the drawer is wide in this direction only
        names = [self.sim.env.sim.model.body_id2name(i) or "" for i in range(self.sim.env.sim.model.nbody)]
        cabinet = next((body.body_xpos[i][:2] for i, name in enumerate(names) if "cabinet" in name), np.full(2, 9.0))
        others = [k for k in obs if k.endswith("_pos") and "robot" not in k and "_to_" not in k and k != self.bowl]

        def cost(degrees: float) -> float:
            yaw = np.deg2rad(degrees)
            point = bowl[:2] + RIM * np.array([np.cos(yaw), np.sin(yaw)])
            near = min((np.linalg.norm(point - self.of(k)[:2]) for k in others), default=1.0)
            walls = max(0, 0.35 - np.linalg.norm(point - cabinet)) * 10 if bowl[2] < 1.0 else 0
            return abs(abs(degrees) - 90) / 90 + max(0, 0.11 - near) * 20 + walls

        return np.deg2rad(sorted([90, -90, 60, -60, 120, -120, 30, -30, 150, -150], key=cost)).tolist()


def matrix(q: np.ndarray) -> np.ndarray:
    """Quaternion (x, y, z, w) -> (3, 3)."""
    x, y, z, w = q
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)]
    rows += [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)]
    return np.array([*rows, 2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]).reshape(3, 3)


def rotation_vector(R: np.ndarray) -> np.ndarray:
    """(3, 3) -> (3,) radians."""
    angle = np.arccos(np.clip((np.trace(R) - 1) / 2, -1, 1))
    axis = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])
    return axis * (0.5 if angle < 1e-4 else angle / (2 * np.sin(angle) + 1e-9))


def straddle(R: np.ndarray, outward: np.ndarray) -> np.ndarray:
    """The hand pointing down, its fingers (its y axis) along +-outward, whichever is the smaller turn from R."""
    down = np.array([0.0, 0.0, -1.0])
    both = [np.stack([np.cross(y, down), y, down], axis=1) for y in (outward, -outward)]
    return min(both, key=lambda Q: np.linalg.norm(rotation_vector(Q @ R.T)))
