"""
A scripted expert for libero_spatial: it takes the black bowl by its rim and puts it down on the plate.

    for action in expert(sim):
        sim.step(action)

The expert knows where everything is, which a policy does not. It acts through the same seven numbers a step. It is
there to check the evaluation, and to make demonstrations.

Vectors are in metres and in the world's frame (z up). R (3, 3) turns the hand's frame into it. Yaw is in radians.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from libero_sim.simulator import Simulator

GOAL = "place_it_on_the_plate"  # in the name of all tasks of libero_spatial
OPEN = -1.0
CLOSE = 1.0

STEP = 0.05  # metres that the hand moves when an action says 1
TURN = 0.5  # radians that it turns
RIM = 0.047  # from the bowl's middle to where the fingers straddle its wall
DRAWER = (1.0, 1.1)  # height of a bowl in the drawer; below is the table, above the cabinet's top


def expert(sim: Simulator) -> Iterator[np.ndarray]:
    """Yield actions of the simulator, endlessly. Each is to be executed before the next is asked for."""
    if GOAL not in sim.env.env.bddl_file_name:
        raise ValueError(f"the expert only knows libero_spatial, not {sim.suite}: {sim.instruction!r}")
    bowl, plate = sim.env.obj_of_interest[:2]
    hand = Hand(sim, bowl, plate)
    while True:
        for yaw in hand.yaws()[:6]:
            yield from hand.carry(yaw)

            # The episode ends with success. If it goes on, back off and try the next direction.
            yield from hand.go(hand.position() + [0, 0, 0.12], hand.rotation(), OPEN, tol=0.03, steps=20)


class Hand:
    """The robot's hand, and what it has to do with the bowl and the plate."""

    def __init__(self, sim: Simulator, bowl: str, plate: str):
        self.sim = sim
        self.bowl = f"{bowl}_pos"
        self.plate = f"{plate}_pos"
        self.start = self.rotation()  # fingers down

    # What the simulator says

    def observe(self, name: str) -> np.ndarray:
        return np.array(self.sim.obs[name])

    def position(self) -> np.ndarray:
        return self.observe("robot0_eef_pos")

    def rotation(self) -> np.ndarray:
        return matrix(self.observe("robot0_eef_quat"))

    # Movements

    def go(
        self,
        target: np.ndarray | Callable[[], np.ndarray],
        R: np.ndarray,
        grip: float,
        tol: float = 0.008,
        angle_tol: float = 0.06,
        steps: int = 60,
        gain: float = 1.0,
    ) -> Iterator[np.ndarray]:
        """
        Go towards a point (3,), or towards what `target()` says at each step, and turn to R. Ends when both are reached
        within `tol` metres and `angle_tol` radians, at the latest after so many steps. gain: below 1 is gentler.
        """
        for _ in range(steps):
            point = target() if callable(target) else target
            move = (point - self.position()) * gain / STEP
            turn = rotation_vector(R @ self.rotation().T) / TURN
            yield np.concatenate([move, turn, [grip]]).clip(-1, 1)

            distance = np.linalg.norm(point - self.position())
            angle = np.linalg.norm(rotation_vector(R @ self.rotation().T))
            if distance < tol and angle < angle_tol:
                return

    def hold(self, target: np.ndarray, R: np.ndarray, grip: float, steps: int) -> Iterator[np.ndarray]:
        """Stay at a point for exactly so many steps."""
        return self.go(target, R, grip, tol=0, steps=steps)

    def close(self, target: np.ndarray, R: np.ndarray, steps: int = 16) -> Iterator[np.ndarray]:
        """
        Close the fingers until they stand still around something. Not a step longer: a policy that learns from it would
        learn to wait.
        """
        before = None
        for _ in range(steps):
            fingers = self.observe("robot0_gripper_qpos")  # (2,)
            if before is not None:
                stand_still = np.abs(fingers - before).max() < 2e-4
                have_moved = np.ptp(fingers) < 0.06  # wide open they stand still, too
                if stand_still and have_moved:
                    return
            before = fingers
            yield from self.hold(target, R, CLOSE, steps=1)

    # The task

    def carry(self, yaw: float) -> Iterator[np.ndarray]:
        """Pinch the rim in direction `yaw` from the bowl's middle, lift, put down: one attempt. Ends where it fails."""
        bowl = self.observe(self.bowl)
        low, high = DRAWER
        is_in_drawer = low < bowl[2] < high
        is_on_top = bowl[2] > high

        outward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        R = straddle(self.start, outward)
        grasp = bowl + RIM * outward + [0, 0, 0.032 if is_in_drawer else 0.045]

        # Rise, go above the rim, turn on the way, and come down in two stages.
        safe = max(self.position()[2], grasp[2] + 0.10)
        yield from self.go(np.append(self.position()[:2], safe), R, OPEN, tol=0.03, angle_tol=0.3, steps=25)
        yield from self.go(np.append(grasp[:2], safe), R, OPEN, tol=0.015, angle_tol=0.08, steps=40)
        yield from self.go(grasp + [0, 0, 0.06], R, OPEN, tol=0.01, steps=25)
        if self.position()[2] - grasp[2] > 0.10:
            return
        yield from self.go(grasp, R, OPEN, tol=0.006, steps=40 if is_in_drawer else 22, gain=0.8)
        if self.position()[2] - grasp[2] > (0.035 if is_on_top else 0.018):
            return  # something is in the way

        # Grasp and lift.
        yield from self.close(grasp, R)
        yield from self.go(self.position() + [0, 0, 0.20], R, CLOSE, tol=0.03, steps=30, gain=0.6)
        if self.observe(self.bowl)[2] < bowl[2] + 0.05:
            return  # it slipped
        yield from self.put_down(R)

    def put_down(self, R: np.ndarray) -> Iterator[np.ndarray]:
        """Bring the bowl that the hand holds to the plate, let go, and leave."""
        plate = self.observe(self.plate)
        height = max(self.position()[2], plate[2] + 0.20 - self.bowl_offset()[2])
        above = partial(self.over, plate, height)
        yield from self.go(above, R, CLOSE, tol=0.015, angle_tol=0.15, steps=50, gain=0.65)

        height = plate[2] + 0.012 - self.bowl_offset()[2]
        onto = partial(self.over, plate, height)
        yield from self.go(onto, R, CLOSE, tol=0.008, angle_tol=0.15, steps=35, gain=0.6)

        yield from self.hold(self.position() - [0, 0, 0.01], R, CLOSE, steps=3)
        yield from self.hold(self.position(), R, OPEN, steps=10)
        yield from self.go(self.position() + [0, 0, 0.15], R, OPEN, tol=0.02, steps=30)
        yield from self.hold(self.position(), R, OPEN, steps=5)

    def bowl_offset(self) -> np.ndarray:
        """Return the bowl's position (3,) as seen from the hand. A bowl that is held hangs below it."""
        return self.observe(self.bowl) - self.position()

    def over(self, plate: np.ndarray, height: float) -> np.ndarray:
        """Return where the hand has to be (3,), at this height, for the bowl to be over the plate."""
        place = plate - self.observe(self.bowl) + self.position()
        return np.append(place[:2], height)

    # Where to pinch

    def yaws(self) -> list[float]:
        """
        Return the directions from the bowl's middle in which to pinch its rim, best first: across the robot's view,
        so that the wrist need not turn, and away from everything else.
        """
        bowl = self.observe(self.bowl)
        low, high = DRAWER
        if low < bowl[2] < high:
            return np.deg2rad([180, 120, 150, 0, -30, 90]).tolist()  # the drawer is wide in this direction only

        cost = partial(self.cost, bowl, self.other_objects(), self.cabinet())
        best_first = sorted([90, -90, 60, -60, 120, -120, 30, -30, 150, -150], key=cost)
        return np.deg2rad(best_first).tolist()

    def cost(self, bowl: np.ndarray, others: list[np.ndarray], cabinet: np.ndarray, degrees: float) -> float:
        """Return how bad a direction is: turn of the wrist, nearness to other objects, nearness to the cabinet."""
        yaw = np.deg2rad(degrees)
        point = bowl[:2] + RIM * np.array([np.cos(yaw), np.sin(yaw)])
        turn = abs(abs(degrees) - 90) / 90

        gap = min((np.linalg.norm(point - other) for other in others), default=1.0)
        crowded = max(0, 0.11 - gap) * 20

        walls = 0
        if bowl[2] < DRAWER[0]:  # on the table
            walls = max(0, 0.35 - np.linalg.norm(point - cabinet)) * 10
        return turn + crowded + walls

    def other_objects(self) -> list[np.ndarray]:
        """Return where on the table (2,) everything else stands."""
        names = []
        for name in self.sim.obs:
            is_position = name.endswith("_pos") and "_to_" not in name
            if is_position and "robot" not in name and name != self.bowl:
                names.append(name)
        return [self.observe(name)[:2] for name in names]

    def cabinet(self) -> np.ndarray:
        """Return where the cabinet stands (2,); far away if there is none."""
        model = self.sim.env.sim.model
        for i in range(model.nbody):
            name = model.body_id2name(i) or ""
            if "cabinet" in name:
                return self.sim.env.sim.data.body_xpos[i][:2]
        return np.full(2, 9.0)


# -----------------------------------------------------------------------------
# Rotations


def matrix(q: np.ndarray) -> np.ndarray:
    """Quaternion (x, y, z, w) -> (3, 3)."""
    x, y, z, w = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_vector(R: np.ndarray) -> np.ndarray:
    """(3, 3) -> (3,) radians."""
    angle = np.arccos(np.clip((np.trace(R) - 1) / 2, -1, 1))
    axis = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])
    if angle < 1e-4:
        return axis * 0.5
    return axis * (angle / (2 * np.sin(angle) + 1e-9))


def straddle(R: np.ndarray, outward: np.ndarray) -> np.ndarray:
    """
    Return a hand (3, 3) that points down, with its fingers (its y axis) along outward or -outward: whichever is the
    smaller turn from R.
    """
    down = np.array([0.0, 0.0, -1.0])
    choices = [np.stack([np.cross(y, down), y, down], axis=1) for y in (outward, -outward)]
    return min(choices, key=lambda Q: np.linalg.norm(rotation_vector(Q @ R.T)))
