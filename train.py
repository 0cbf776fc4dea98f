"""Train a YOLOv4-family detector: `python train.py --norm cmbn --data PATH --cfg yolov4-tiny`.

`engine/job.py` settles what is asked for, `engine/trainer.py` builds it, `train` is the loop, and what it repeats is in
`engine/step.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from cfg.parse import CfgError
from engine.auto_subdivisions import resolve_subdivisions
from engine.job import Job, make_detector, open_run, parse_job
from engine.trainer import Trainer
from evaluation.coco_map import CocoTable
from evaluation.evaluator import Evaluator
from evaluation.plots import plot_results
from evaluation.recalibration import recalibrate_on
from models.detector import build_network
from models.freeze import freeze
from utils import ranks
from utils.atomic_file import warn_on_disk_error
from utils.checkpoint import Checkpoint
from utils.draw import draw_batch
from utils.environment import pick_device
from utils.page import run_page
from utils.stop import Stop, Stopped


def train(job: Job, stop: Stop | None = None, *, is_reported: bool = True) -> CocoTable:
    """From a job to a trained network in its folder. Returns the table of the best weights on the validation split.

    is_reported: what they find is written and drawn, too, which takes as long as many steps of a small network.
    Stopped, after last.pt was written, where a stop was requested: the job goes on from there.
    """
    stop = stop or Stop()
    run = Trainer(job, stop)
    try:
        if job.checkpoint is None:
            run.keep_last()  # a run that is killed early can go on, too
        for epoch in range(run.epochs_done, run.epochs):
            for batch in run.batches(epoch):
                if run.steps_done == 0:
                    run.log.image("first_batch", draw_batch(batch, job.train_set.class_names))
                rate = run.schedule.rate(run.steps_done)
                for group in run.optimizer.param_groups:
                    group["lr"] = rate * group["lr_scale"]
                run.regime.prepare(run.steps_done)
                losses = run.step(batch)
                run.average.update(run.network, step=run.steps_done)
                run.log.losses(run.steps_done, losses, rate=rate, epoch=f"{epoch + 1}/{run.epochs}")
                is_stopped, is_save_due = ranks.any_rank(stop.requested, run.log.is_save_due())
                if is_stopped:
                    raise Stopped
                if is_save_due:
                    run.keep_last()

            row = {"step": run.steps_done, "epoch": epoch + 1, "lr": run.schedule.rate(run.steps_done - 1)}
            is_measured = run.is_evaluation_due(epoch)
            if is_measured:
                run.keep_last()  # an evaluation can take long, and run out of memory
                run.average.agree()
                table = run.evaluator.measure(show=run.show_predictions)
                row |= {"AP": table.AP, "AP50": table.AP50}
                run.log.say(f"epoch {epoch + 1}: AP {table.AP:.3f}  AP50 {table.AP50:.3f}")
            run.log.end_epoch(row)
            run.epochs_done = epoch + 1
            if is_measured and run.best_ap <= table.AP:  # of equal ones the later, which learnt more
                run.keep_best(table.AP)
            (is_save_due,) = ranks.any_rank(run.log.is_save_due(at_epoch_end=True))
            if is_measured or is_save_due:
                run.keep_last()
        (is_unmeasured,) = ranks.any_rank(run.best_ap == float("-inf"))
        if is_unmeasured:  # resumed, and told to end before the first evaluation; or best.pt met a full disk
            run.average.agree()
            run.keep_best(run.evaluator.measure().AP)
            run.keep_last()
    except Stopped as stopped:
        stopped.is_kept = run.is_kept or run.keep_last()
        raise
    finally:
        run.log.close()
    return finish(job, stop, is_reported=is_reported)


def finish(job: Job, stop: Stop, *, is_reported: bool) -> CocoTable:
    """Measure the best weights, and write all that shows them; give their norms precise statistics, where asked for."""
    options, path = job.options, job.folder / "best.pt"
    best = ranks.broadcast(Checkpoint.from_file(path) if ranks.is_rank_zero() else None)
    assert best is not None
    network = build_network(best, path=str(path)).to(ranks.local_device(pick_device(options.device)))
    if options.optim.freeze:
        freeze(network, options.optim.freeze)  # precise statistics are for the layers that learnt
    detector = make_detector(options, network, job.train_set.class_names)
    loading = {"batch_size": job.mini_batch, "workers": options.workers}
    evaluator = Evaluator(detector, job.val_set, backend=options.eval_backend, stop=stop, **loading)
    measure = partial(evaluator.report, job.folder) if is_reported else evaluator.measure
    if not options.norm.precise_bn or best.is_precise:
        keep_weights(job, best)
        return measure()
    before = evaluator.measure()
    source = recalibrate_on(job.train_set, detector, image_count=options.norm.precise_bn, **loading)
    after = measure()
    if ranks.is_rank_zero():
        best = replace(best, weights=network.state_dict(), best_ap=after.AP, is_precise=True)
        with warn_on_disk_error(path):
            best.to_file(path)
        keep_weights(job, best)
        print(f"AP {before.AP:.3f} with running averages, {after.AP:.3f} with {source}, which best.pt now has")
    return after


def keep_weights(job: Job, best: Checkpoint) -> None:
    """best.pt as best.safetensors."""
    if ranks.is_rank_zero():
        with warn_on_disk_error(job.folder / "best.safetensors"):
            best.to_safetensors(job.folder / "best.safetensors")


def main(argv: Sequence[str] | None = None) -> None:
    with ranks.process_group():
        job = open_run(resolve_subdivisions(parse_job(argv)))
        try:
            with Stop() as stop:
                table = train(job, stop)
        except Stopped as stopped:
            if ranks.is_rank_zero():
                what = "nothing is lost" if stopped.is_kept else "but last.pt could not be written and is older"
                print(f"\nstopped, {what}; go on with: python train.py --resume {job.folder}")
            return
        if not ranks.is_rank_zero():
            return
        with warn_on_disk_error(job.folder / "results.png"):
            plot_results(job.folder / "results.csv", job.folder / "results.png")
        best = job.folder / "best.pt"
        print(f"\n{best} on {job.val_set.name} {job.val_set.split}:")
        print(table.summary(), table.class_table(), sep="\n\n")
        print(f"\nall of it is in {job.folder}; next: python detect.py --weights {best} IMAGES")


if __name__ == "__main__":
    run_page(main, CfgError)
