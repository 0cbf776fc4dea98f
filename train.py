"""Train a YOLOv4-family detector: `python train.py --norm cmbn --data PATH --cfg yolov4-tiny`.

`engine/job.py` decides the settings, `engine/trainer.py` builds the parts, `train` is the loop, and `engine/step.py` is
one step of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cfg.parse import CfgError
from engine.announce import announce
from engine.events import Listener
from engine.job import Job, open_run, parse_job
from engine.rate_finder import find_rate
from engine.trainer import Trainer, make_val_evaluator
from evaluation.coco_map import per_cent
from evaluation.domains import DomainEvaluator
from evaluation.evaluator import Evaluator
from evaluation.recalibration import recalibrate_on
from evaluation.report.report import write_report
from models.freeze import freeze
from models.norms.domains import choose
from models.stored_network import build_network
from models.thresholds import Thresholds
from options import TrainOptions
from utils import ranks
from utils.atomic_file import warn_on_disk_error
from utils.checkpoint import Checkpoint
from utils.environment import pick_device
from utils.flags import flatten
from utils.page import run_page
from utils.run_lock import released_afterwards
from utils.stop import Stop, Stopped


def train(job: Job, folder: Path, stop: Stop | None = None, listeners: Sequence[Listener] = ()) -> None:
    """Train to the end; best.pt in `folder` then has the EMA weights with the highest AP on the validation split.

    listeners: are told of its events, beside those that --logger names. Raises Stopped if `stop` was requested, after
    last.pt was written, from which --resume continues.
    """
    run = Trainer(job, folder, stop or Stop())
    try:
        if job.checkpoint is None:
            run.save_last()  # so that a run that is killed before its first checkpoint can be resumed
        if job.options.optim.learning_rate == "auto":
            run.settle_rate(find_rate(run))
        announce(run)
        run.begin(listeners)
        while not run.is_over:
            epoch = run.epochs_done
            for batch in run.batches(epoch):
                lr = run.schedule.rate(run.steps_done)
                run.step.set_rate(lr)
                run.norm_freeze.set_mode(run.steps_done)
                losses = run.step(batch)
                run.loss_watch(run.steps_done, float(losses.sum()))
                run.ema.update(run.network, step=run.steps_done)
                run.log.losses(run.steps_done, losses, lr=lr, epoch=epoch)
                run.fit_to_time_budget()
                run.save_if_due_or_stop()
            run.end_epoch(epoch, run.evaluate() if run.length.is_evaluation_due(epoch) else None)
        run.ensure_best()
        run.require_saved()
    except Stopped as stopped:
        if not run.is_saved:
            stopped.is_saved = run.save_last()
        run.log.end()
        raise
    except BaseException as error:
        run.log.end(error)
        raise
    run.log.end()


def finish(job: Job, folder: Path, stop: Stop | None = None) -> Evaluator | DomainEvaluator:
    """Recompute the norm statistics of best.pt for --precise-bn.

    Returns the evaluator of its weights on the validation split, for the report.
    """
    options, path = job.options, folder / "best.pt"
    best = ranks.broadcast(Checkpoint.from_file(path) if ranks.is_rank_zero() else None)
    assert best is not None
    network = build_network(best, path=str(path)).to(ranks.local_device(pick_device(options.device)))
    if options.optim.freeze:
        freeze(network, options.optim.freeze)  # so that recalibration skips the norms of frozen layers
    evaluator = make_val_evaluator(job, network, stop)
    if options.norm.precise_bn and not best.is_precise:
        populations = [domain.train_set for domain in job.domains]
        for domain, train_set in enumerate(populations if options.norm.domain_statistics == "own" else [job.train_set]):
            choose(network, domain)
            source = recalibrate_on(
                train_set,
                evaluator.detector,
                image_count=options.norm.precise_bn,
                batch_size=job.mini_batch,
                workers=options.workers,
            )
        before, after = best.best_ap, evaluator.measure().AP
        best = replace(best, weights=network.state_dict(), best_ap=after, is_precise=True)
        if ranks.is_rank_zero():
            with warn_on_disk_error(path):
                best.to_file(path)
            print(
                f"AP {per_cent(before)} with running averages, {per_cent(after)} with {source}; best.pt has the latter"
            )
    return evaluator


def publish(folder: Path, thresholds: Thresholds | None) -> None:
    """Put the thresholds into best.pt, and export it as best.safetensors."""
    best = Checkpoint.from_file(folder / "best.pt")
    best = replace(best, thresholds={} if thresholds is None else thresholds.to_json())
    with warn_on_disk_error(folder / "best.pt"):
        best.to_file(folder / "best.pt")
    with warn_on_disk_error(folder / "best.safetensors"):
        best.to_safetensors(folder / "best.safetensors")


def main(argv: Sequence[str] | None = None) -> None:
    with ranks.process_group(), released_afterwards():
        job = parse_job(argv)
        folder = open_run(job)
        try:
            with Stop() as stop:
                train(job, folder, stop)
                table = finish(job, folder, stop).report(folder)
        except Stopped as stopped:
            if ranks.is_rank_zero():
                outcome = (
                    "nothing is lost" if stopped.is_saved else "last.pt could not be updated and is of an earlier step"
                )
                print(f"\nstopped; {outcome}; resume with: python train.py --resume {folder}")
            if not stopped.is_saved:
                raise SystemExit(2) from None
            return
        if not ranks.is_rank_zero():
            return
        publish(folder, table.thresholds)
        best, norm = folder / "best.pt", job.options.norm
        print(f"\n{best} on {job.val_set.name} {job.val_set.split}:")
        print(table.summary(), table.class_table(), sep="\n\n")
        chosen = f" --domain {job.domains[0].name}" if "own" in (norm.domain_statistics, norm.domain_affine) else ""
        write_report(folder, flatten(TrainOptions()))
        print(f"\neverything is in {folder}; next: python detect.py --weights {best}{chosen} IMAGES")


if __name__ == "__main__":
    run_page(main, CfgError)
