"""``moe-kernels gmoe``: domain generalization on folders of images, on one device or under ``torchrun``."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm  # type: ignore[import-untyped]

from moe_kernels.cli import accuracy
from moe_kernels.cli.common import Device, Precision, SkipBad, Workers, first_rank_first, one_sentence
from moe_kernels.models import distributed, evaluation, files, gmoe, report
from moe_kernels.models.data import folders
from moe_kernels.models.gmoe import pictures, protocol, tables

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Root = Annotated[Path, typer.Argument(help="Folder with the images: ROOT/<domain>/<class>/<image>.")]


@app.command()
def train(
    root: Root,
    test_domain: Annotated[list[str], typer.Option(help="Domain to hold out; may be repeated. all: each in turn.")],
    model: Annotated[
        str, typer.Option(help="One of moe_kernels.models.gmoe.list_models().")
    ] = "gmoe_small_patch16_224",
    pretrained: Annotated[bool, typer.Option(help="Start from timm's ImageNet-1k weights (downloads them).")] = True,
    weights: Annotated[Path | None, typer.Option(help="Start from this .safetensors or .pth file instead.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Also train the dense ViT (ERM) on the same batches.")] = False,
    layers: Annotated[str, typer.Option(help="last_two, every_two, or block indices such as 8,10.")] = "last_two",
    num_experts: Annotated[int, typer.Option(help="Experts of a layer.")] = 6,
    top_k: Annotated[int, typer.Option(help="Experts a patch is sent to.")] = 1,
    router: Annotated[str, typer.Option(help="cosine or linear.")] = "cosine",
    trials: Annotated[
        int, typer.Option(min=1, help="Runs with different splits and seeds for each held-out domain.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first trial; the next have the next.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Default: the paper's, 5001 (15001 for DomainNet).")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Default: the paper's, 300 (500 for DomainNet).")] = None,
    batch: Annotated[int, typer.Option(help="Images of each training domain in a step, over all ranks.")] = 32,
    lr: Annotated[float | None, typer.Option(help="Default: the paper's for the data set.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: the paper's for the data set.")] = None,
    auxiliary_weight: Annotated[float, typer.Option(help="Weight of the balancing loss.")] = 0.01,
    precision: Annotated[Precision, typer.Option(help="bfloat16 runs the model under autocast.")] = Precision.float32,
    device: Device = "auto",
    workers: Workers = 4,
    skip_bad: SkipBad = False,
    out: Annotated[Path, typer.Option(help="Folder for results, report and checkpoints.")] = Path("gmoe-runs"),
) -> None:
    """Train on all domains but one, select by training-domain validation, test on the one held out.

    Finished runs under OUT are kept and an interrupted one goes on where it was, so the same command may be repeated,
    and several of them, for different domains or seeds, may share OUT: the table is of all that is there.
    """
    with one_sentence(), distributed.process_group(device) as on:
        first = distributed.rank() == 0
        create = {
            "name": model,
            "layers": _layers(layers),
            "num_experts": num_experts,
            "top_k": top_k,
            "router": router,
        }
        data = _load(root, _image_size(model), skip_bad)
        config = protocol.paper_config(
            data.name,
            steps=steps,
            eval_every=eval_every,
            batch_per_domain=batch,
            learning_rate=lr,
            weight_decay=weight_decay,
            auxiliary_weight=auxiliary_weight,
            precision=precision.value,
        )
        start = weights if weights is not None else pretrained
        entrants = [_entrant(model, create, start, len(data.classes))]
        if dense:
            entrants.insert(0, _entrant(f"{model} dense", {**create, "layers": []}, start, len(data.classes)))
        held_out = None if "all" in test_domain else test_domain
        todo = list(
            protocol.leave_one_out(entrants, data, config, out, held_out=held_out, trials=range(seed, seed + trials))
        )
        for run in todo:
            with tqdm(total=config.steps, desc=str(run), unit="step", disable=None if first else True) as bar:
                result = protocol.perform(
                    run, data, device=on, workers=workers, on_step=lambda step, bar=bar: bar.update(step - bar.n)
                )
            if first:
                selected = result["selected"]
                typer.echo(
                    f"{run}: {100 * selected['test']:.1f} % there, {100 * selected['validation']:.1f} % in validation, "
                    f"at step {selected['step']}. Weights: {run.folder / 'selected.pt'}"
                )
        if first:
            _report(out)


@app.command()
def evaluate(
    root: Root,
    checkpoint: Annotated[Path, typer.Option(help="A selected.pt that `gmoe train` or the demo wrote.")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write. Default: evaluation.json beside it.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 64,
    precision: Annotated[Precision, typer.Option(help="bfloat16 runs the model under autocast.")] = Precision.float32,
    device: Device = "auto",
    workers: Workers = 4,
    skip_bad: SkipBad = False,
) -> None:
    """Accuracy of trained weights on every image of every domain of ROOT."""
    with one_sentence(resumes=False), distributed.process_group(device) as on:
        saved = files.read_torch(checkpoint)
        run = saved.get("run") if isinstance(saved, dict) else None
        if not run or "create" not in run:
            raise ValueError(f"{checkpoint} must be a selected.pt written by `moe-kernels gmoe train`")
        model = gmoe.create(**run["create"], num_classes=len(run["classes"]))
        model.load_state_dict(saved["model"])
        data = _load(root, model.patch_embed.img_size[0], skip_bad)
        if list(data.classes) != run["classes"]:
            raise ValueError(
                f"{root} must have the classes of {checkpoint}: {', '.join(run['classes'])}; "
                f"it has {', '.join(data.classes)}"
            )
        model.to(on)
        measured = {
            name: {
                "accuracy": evaluation.accuracy(model, part, batch=batch, workers=workers, precision=precision.value),
                "images": len(part),
                "role": "held out" if name in run["held_out"] else "trained on" if name in run["images"] else "new",
            }
            for name, part in zip(data.domains, data.evaluation, strict=True)
        }
        if distributed.rank() == 0:
            path = out or checkpoint.with_name("evaluation.json")
            found = {"checkpoint": str(checkpoint), "step": saved["step"], "data": data.name, "domains": measured}
            files.write_json(path, found)
            rows = [["domain", "in training", "images", "accuracy, %"]]
            rows += [
                [name, part["role"], str(part["images"]), f"{100 * part['accuracy']:.1f}"]
                for name, part in measured.items()
            ]
            accuracy.show(f"{run['model']}, step {saved['step']}", rows)
            typer.echo(f"written to {path}")


def _layers(text: str) -> str | list[int]:
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        return text  # a name, which create knows or refuses


def _image_size(model: str) -> int:
    with torch.device("meta"):
        size: int = gmoe.create(model, num_classes=1, layers=[]).patch_embed.img_size[0]
    return size


def _load(root: Path, image_size: int, skip_bad: bool) -> Any:
    """The images of ROOT."""
    data = first_rank_first(lambda: folders.load(root, image_size=image_size, skip_bad=skip_bad))
    if distributed.rank() == 0:
        for skipped in data.skipped:
            typer.echo(f"skipped: {skipped}", err=True)
    return data


def _entrant(name: str, create: dict[str, Any], start: bool | Path, classes: int) -> Any:
    description: dict[str, Any] = {"create": create, "pretrained": bool(start)}
    if isinstance(start, Path):
        description["weights"] = hashlib.sha256(start.read_bytes()).hexdigest()
    return protocol.Entrant(name, lambda: gmoe.create(**create, num_classes=classes, pretrained=start), description)


def _report(out: Path) -> None:
    """The table of every finished run under ``out``, on the terminal and as report.md, report.html and results.json."""
    results = protocol.finished(out)
    table = protocol.collect(results)
    rows = tables.accuracy_rows(table)
    pictures.plot_curves(results, out / "curves.png")
    files.write_json(out / "results.json", {"table": tables.table_json(table), "runs": results})
    sections = [
        report.Section(
            "Out-of-domain accuracy",
            ["Percent; mean ± standard error over trials; weights selected by training-domain validation."],
            rows,
        ),
        report.Section("Every trial", (), tables.trial_rows(table)),
        report.Section("Accuracy over training", (), picture="curves.png"),
    ]
    report.write(out, f"{table.dataset}: each domain held out", sections)
    accuracy.show("Out-of-domain accuracy, %", rows)
    typer.echo(f"report: {out / 'report.html'}")
