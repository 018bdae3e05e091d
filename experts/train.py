"""Builds the parts of one RL stage and runs the loop on them; fusion calls it with another credit and loss.

A stage goes on from ``state.pt``, its newest checkpoint. If one of its rules may roll it back there is ``good.pt`` too,
the newest checkpoint at which all was well; to roll back is to make a ``state.pt`` of that and to go on from there.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from experts.rollouts import Player
from experts.stats import batch_stats, reading
from posttrain.engine.local import LocalEngine
from posttrain.engine.start import start_engine, weights_outlet
from posttrain.engine.vllm import VllmEngine
from posttrain.errors import EngineError, UserError
from posttrain.files import save_state, write_text
from posttrain.groups import Group, TaskSource
from posttrain.journal import Journal, read_journal, rollout_from_dict, rollout_to_dict
from posttrain.loop import Loop
from posttrain.metrics import Metrics
from posttrain.mismatch import to_record
from posttrain.model.checkpoint import load_any
from posttrain.objective_settings import LossConfig
from posttrain.protocols import Credit
from posttrain.run import RunDir
from posttrain.settings import EngineConfig, LoopConfig, TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Rollout
from posttrain.waits import forget
from posttrain.watch import Alarm, Paused, Watch
from posttrain.watch_settings import WatchConfig

log = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Folder in the checkpoint of a stage of what it trained beside its base, if that was an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of training, whatever gives it credit."""

    name: str
    """Also the name of its journal, checkpoint and metrics."""
    start: Path
    """Folder of the model it starts from."""
    loop: LoopConfig
    trainer: TrainerConfig
    loss: LossConfig
    engine: EngineConfig
    credit: Credit
    player: Player
    source: TaskSource
    """Tasks of the groups."""
    shares: Mapping[str, float]
    """World to its part of the groups."""
    seed: int
    oversample: Mapping[str, float] = field(default_factory=dict[str, float])
    """World to the groups started for one that can be trained, to begin with."""
    judging: str | None = None
    """World of groups that come beside the shares now and then."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """When to warn, pause or roll back."""

    @property
    def key(self) -> str:
        """Where it stands in the config."""
        return self.name.replace("expert-", "experts.", 1)


class _RollBack(Exception):
    """A rule wants the stage back where all was well."""

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(alarm.text)
        self.alarm = alarm


class _RolloutJournal:
    """A journal of rollouts."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def write(self, record: Rollout) -> None:
        self._journal.write(rollout_to_dict(record))


async def run_stage(stage: Stage, run: RunDir, metrics: Metrics, progress: Progress) -> Path:
    """Train, going on from the stage's last checkpoint if there is one. Returns the folder of the trained model.

    Raises Paused, UserError for a rule that wants more roll backs than there may be, and EngineError if engines failed
    more often than there are restarts."""
    bar = progress.add_task(stage.name, total=stage.loop.steps)
    restarts, noise = 0, stage.player.noise
    # Source and noise live longer than an engine: a new one before the first checkpoint begins as this one does.
    begin = {"finished": [], "accepted": 0, "source": stage.source.state(), "noise": noise and noise.state_dict()}
    while True:  # a roll back counts itself in the checkpoint, and is refused when there were enough
        alarm = None
        try:
            folder = await _train(stage, run, metrics, partial(progress.update, bar), begin)
            break
        except _RollBack as wanted:
            alarm = wanted.alarm
        except EngineError as error:
            restarts += 1
            if restarts > stage.engine.restarts:
                raise
            log.warning("%s: %s. A new engine goes on from the last checkpoint and the journal", stage.name, error)
        except UserError:
            forget(run.waits_file)  # it has said why it ends
            raise
        # Not in the handler: the error holds on to the trainer that is no more.
        if alarm is not None:
            _roll_back(stage, run, alarm)
    forget(run.waits_file)
    return folder


async def _train(
    stage: Stage, run: RunDir, metrics: Metrics, show: Callable[..., None], begin: Mapping[str, Any]
) -> Path:
    """From the last checkpoint, or ``begin``, to the end, or until a rule wants something else."""
    folder = run.checkpoint(stage.name)
    torch.manual_seed(stage.seed)
    work = run.weights(stage.name)
    outlet = weights_outlet(stage.engine, work, stage.loop.max_staleness + 1)
    trainer = Trainer(load_any(stage.start, torch.float32), stage.trainer, stage.loss, stage.loop.steps, outlet)
    engine = None
    try:
        steps = _Steps(stage, run, metrics, show, trainer, begin)
        engine = await start_engine(stage.engine, stage.start, work)
        await steps.take(engine)
    finally:
        if engine is not None:
            await engine.close()
        trainer.close()
    if stage.trainer.lora is not None:
        trainer.save_adapter(folder / ADAPTER)
    trainer.save(folder)
    stage.player.chat.tokenizer.save_pretrained(folder)
    return folder


class _Steps:
    """What happens around the loop at every step: metrics, records, rules, checkpoints."""

    def __init__(
        self,
        stage: Stage,
        run: RunDir,
        metrics: Metrics,
        show: Callable[..., None],
        trainer: Trainer,
        begin: Mapping[str, Any],
    ) -> None:
        self.stage, self.run, self.metrics, self.show, self.trainer = stage, run, metrics, show, trainer
        self.noise = stage.player.noise
        self.path, self.good_path = _checkpoints(run, stage)
        named = [*stage.shares, stage.judging] if stage.judging else stage.shares
        worlds = [f"outcome/{world}" for world in named]
        self.watch = Watch(stage.watch, f"{stage.key}.watch", worlds)
        self.roll_backs = 0
        self.state = dict(begin)
        if self.path.exists():
            self._restore(torch.load(self.path, weights_only=True))
        elif self.noise is not None:
            self.noise.load_state_dict(begin["noise"])
        if not _rolls_back(stage):
            self.good_path.unlink(missing_ok=True)  # it would be an old one when a rule asks for one again
        elif not self.good_path.exists():
            save_state(self._whole({**self.state, "trainer": trainer.state()}), self.good_path)
        show(completed=trainer.version)

    def _restore(self, state: dict[str, Any]) -> None:
        self.state = {k: v for k, v in state.items() if k != "trainer"}  # large, and the trainer has it
        self.trainer.restore(state["trainer"])
        if self.noise is not None:
            self.noise.load_state_dict(state["noise"])
        self.watch.restore(state["watch"])
        self.roll_backs = state["roll_backs"]
        log.info("%s: resumed at version %d", self.stage.name, self.trainer.version)

    async def take(self, engine: LocalEngine | VllmEngine) -> None:
        """Run the loop to its end."""
        stage, version = self.stage, self.trainer.version
        journal_path = self.run.rollouts(stage.name)
        self.metrics.rewind(stage.name, version)
        self.engine, self.drafts = engine, engine.stats()
        with (
            Journal(journal_path) as journal,
            _rewound(self.run.rollouts(f"{stage.name}.trained"), lambda r: r["version"] <= version) as self.trained,
            _rewound(self.run.rollouts(f"{stage.name}.mismatch"), lambda r: r["version"] <= version) as self.mismatch,
            _rewound(_alarms(self.run, stage), self._remains) as self.alarms,
        ):
            self.loop = Loop(
                stage.loop,
                name=stage.name,
                seed=stage.seed,
                engine=engine,
                trainer=self.trainer,
                credit=stage.credit,
                source=stage.source,
                shares=stage.shares,
                oversample=stage.oversample,
                waits_file=self.run.waits_file,
                run_rollout=stage.player,
                journal=_RolloutJournal(journal),
                on_step=self.on_step,
                checkpoint=self.save,
            )
            self.loop.resume(self.state, [rollout_from_dict(r) for r in read_journal(journal_path)])
            try:
                await self.loop.run()
            except FloatingPointError as error:
                self._not_finite(error)
                raise

    def _remains(self, alarm: Mapping[str, Any]) -> bool:
        """Whether a recorded alarm is none of a step that will be taken again."""
        return alarm["roll_backs"] < self.roll_backs or alarm["version"] <= self.trainer.version

    def on_step(self, version: int, stats: dict[str, float], batch: Sequence[Group]) -> None:
        """Write down what a step came to, and do what the rules say of it."""
        name = self.stage.name
        earlier, self.drafts = self.drafts, self.engine.stats()
        if self.noise is not None:
            stats |= self.noise.update([r for g in batch for r in g.rollouts])
        stats |= batch_stats(batch, version) | self.drafts.since(earlier)
        if self.roll_backs:
            stats["roll_backs"] = float(self.roll_backs)
        alarms = self.watch.see(version, stats)
        rollouts = [r.id for g in batch for r in g.rollouts if r.valid]
        self.trained.write({"version": version, "groups": [g.number for g in batch], "rollouts": rollouts})
        self.mismatch.write(to_record(version, self.trainer.gaps))
        self.metrics.log(version, name, stats | {f"alarm/{a.rule}": 1.0 for a in alarms})
        self.show(completed=version, description=f"{name} {reading(stats)}")
        for alarm in alarms:
            if alarm.new:
                self._tell(alarm)
        self._obey(alarms)

    def _tell(self, alarm: Alarm) -> None:
        log.warning("%s: at version %d by the rule %s: %s", self.stage.name, alarm.version, alarm.rule, alarm.text)
        told = {"version": alarm.version, "rule": alarm.rule, "do": alarm.do, "text": alarm.text}
        self.alarms.write({**told, "roll_backs": self.roll_backs})

    def _obey(self, alarms: Sequence[Alarm]) -> None:
        pauses = [a for a in alarms if a.do == "pause"]
        if pauses:
            # Whoever goes on has seen it, and takes what is there for the new measure.
            for alarm in pauses:
                self.watch.start_over(alarm.rule)
            save_state(self._whole(self.loop.state()), self.path)
            raise Paused(_pause(self.stage, pauses[0]))
        for alarm in alarms:
            if alarm.do == "roll_back":
                if self.roll_backs >= self.stage.watch.max_roll_backs:
                    raise UserError(_enough(self.stage, alarm, self.roll_backs))
                raise _RollBack(alarm)

    def _not_finite(self, error: FloatingPointError) -> None:
        """A gradient with which no step can be taken, and which no number stands for: as every rule on its norm that
        rolls back has it."""
        for name, rule in self.stage.watch.rules.items():
            if rule is not None and rule.metric == "grad_norm" and rule.do == "roll_back":
                version, bound = self.trainer.version + 1, {"value": math.nan, "bound": math.nan, "steps": 1}
                alarm = Alarm(rule=name, do=rule.do, version=version, new=True, text=str(error), **bound)
                self._tell(alarm)
                self._obey([alarm])

    def save(self, state: dict[str, Any]) -> None:
        """Write the loop's state and ours, as the good checkpoint too if this is one."""
        whole = self._whole(state)
        save_state(whole, self.path)
        if _rolls_back(self.stage) and self.watch.well:
            save_state(whole, self.good_path)

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        noise = {} if self.noise is None else {"noise": self.noise.state_dict()}
        return {**state, **noise, "watch": self.watch.state(), "roll_backs": self.roll_backs}


def _checkpoints(run: RunDir, stage: Stage) -> tuple[Path, Path]:
    folder = run.checkpoint(stage.name)
    return folder / "state.pt", folder / "good.pt"


def _alarms(run: RunDir, stage: Stage) -> Path:
    return run.checkpoint(stage.name) / "alarms.jsonl"


def _rolls_back(stage: Stage) -> bool:
    return any(rule is not None and rule.do == "roll_back" for rule in stage.watch.rules.values())


def _rewound(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> Journal:
    """The journal in ``path`` without the records of steps that will be taken again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.dumps(r, separators=(",", ":")) for r in read_journal(path) if keep(r)]
    write_text(path, "".join(f"{line}\n" for line in kept))
    return Journal(path)


def _roll_back(stage: Stage, run: RunDir, alarm: Alarm) -> None:
    """Make the good checkpoint the newest one."""
    newest, good_path = _checkpoints(run, stage)
    good = torch.load(good_path, weights_only=True)
    before = torch.load(newest, weights_only=True)["roll_backs"] if newest.exists() else 0
    groups = {int(r["group"].rsplit("/", 1)[1]) for r in read_journal(run.rollouts(stage.name))}
    save_state(rolled_back(good, groups, before + 1, stage.watch.lr_scale), newest)
    version = good["trainer"]["version"]
    log.warning("%s: rolled back from version %d to %d by the rule %s", stage.name, alarm.version, version, alarm.rule)


def rolled_back(good: Mapping[str, Any], groups: Collection[int], roll_backs: int, lr_scale: float) -> dict[str, Any]:
    """The checkpoint ``good``, for a stage that goes on without ``groups`` and at a smaller rate.

    ``groups`` are all that have a rollout: those that led astray, and those that the policy which went astray began."""
    finished = {*good["finished"], *groups}
    state = {**good, "finished": sorted(finished), "roll_backs": roll_backs}
    if "tasks" in good:
        state["tasks"] = {n: task for n, task in good["tasks"].items() if int(n) not in finished}
    trainer, factor = dict(good["trainer"]), lr_scale ** (roll_backs - good["roll_backs"])
    rates = trainer["schedule"]
    trainer["schedule"] = {**rates, **{k: [factor * rate for rate in rates[k]] for k in ("base_lrs", "_last_lr")}}
    optimizer = trainer["optimizer"]
    slower = [{**g, **{k: factor * g[k] for k in ("lr", "initial_lr")}} for g in optimizer["param_groups"]]
    return {**state, "trainer": {**trainer, "optimizer": {**optimizer, "param_groups": slower}}}


def _pause(stage: Stage, alarm: Alarm) -> str:
    rule = f"{stage.key}.watch.rules.{alarm.rule}"
    return (
        f"{stage.name}: paused at version {alarm.version} by the rule {alarm.rule}: {alarm.text}. A checkpoint is "
        "written. The same command goes on from it, and the rule then measures anew; to change the rule first, add "
        f"--set {rule}.do=warn, or another bound, or --set {rule}=null to drop it"
    )


def _enough(stage: Stage, alarm: Alarm, roll_backs: int) -> str:
    watch = f"{stage.key}.watch"
    return (
        f"{stage.name}: the rule {alarm.rule} wants a roll back at version {alarm.version}: {alarm.text}. There were "
        f"{roll_backs}, which is all there may be ({watch}.max_roll_backs). Lower {stage.key}.trainer.lr, or see if "
        f"the rule is a good one; with --set {watch}.rules.{alarm.rule}.do=warn the same command goes on regardless"
    )
