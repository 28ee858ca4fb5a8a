"""Merge methods give what the reference implementations gave, in float32 and in float64.

A case is dispatched on its method and params alone. What a reference does differently from the method here is stated
in its params, and translated to the parameters of the method below.
"""

import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from moerge import merging
from moerge.merging import arrays, kinship
from moerge.merging.methods import adamerging, della, lorahub
from moerge.merging.sources import Factors
from moerge.tensors.adapters import LowRank

FAMILY = "merging"
SEEDS = 100


def items(case):
    return [("float32", np.float32), ("float64", np.float64)]


def test_the_reference_is_matched(golden, variant, request):
    case, params = golden.case, golden.case["params"]
    if case["method"] == "kinship":
        check_kinship(case, load_file(golden.folder / case["file"]), dtype=variant)
        return
    translate = TRANSLATIONS.get(case["method"])
    method, parameters = translate(params) if translate else (case["method"], None)
    if parameters is None or method not in merging.catalogue():
        if request.config.getoption("--golden-allow-unbuilt"):
            pytest.skip(f"not built: {case['method']}")
        pytest.fail(f"not built: {case['method']}", pytrace=False)
    stored = load_file(golden.folder / case["file"])
    experts = read_experts(stored, case["experts"], dtype=variant)
    if case["kind"] == "statistical":
        check_statistics(method, parameters, experts[0], stored, case["tolerance"])
        return
    if method in PARTED:
        check_exclusive_parts(method, parameters, experts, stored, case["tolerance"])
        return
    merged = arrays.merge(
        method,
        experts,
        weights=weights_of(params, len(experts)),
        parameters=parameters,
        digests=[f"{position:04}" for position in range(len(experts))],
        rank=output_rank(method, params, experts) if case["level"] == "lora" else None,
        statistics=read_statistics(stored, experts, params) if merging.catalogue()[method].needs else None,
    )
    if case["level"] == "lora":
        check_adapter(merged, experts, stored, case, method)
        return
    wanted = {name.removeprefix("out/"): values for name, values in stored.items() if name.startswith("out/")}
    check_objective(wanted, stored, case["tolerance"])
    assert merged.keys() == wanted.keys()
    for name, values in wanted.items():
        assert merged[name].dtype == variant
        assert_close(merged[name], values, case["tolerance"], name)


def check_kinship(case, stored, *, dtype):
    """Each pair's figures; the reference loses the sign of the cosine."""
    found = kinship.measure(read_experts(stored, case["experts"], dtype=dtype))
    figures = {"pcc": found.pearson, "cs": np.abs(found.cosine), "ed": found.distance}
    wanted = {name.removeprefix("out/"): values for name, values in stored.items() if name.startswith("out/")}
    assert len(wanted) == len(figures) * case["experts"] * (case["experts"] - 1) / 2
    for name, values in wanted.items():
        metric, one, other = name.split(".")
        assert_close(figures[metric][int(one), int(other)].reshape(1), values, case["tolerance"], name)


def check_objective(wanted, stored, tolerance):
    """What learning coefficients makes small is stored beside the merge that they give."""
    if "entropy" in wanted:
        assert_close(np.array([adamerging.entropy(stored["logits/x"])]), wanted.pop("entropy"), tolerance, "entropy")


def check_adapter(merged, experts, stored, case, method):
    """Compare deltas, and the factors of cat, which are determined."""
    params = case["params"]
    out = {name.removeprefix("out/"): values for name, values in stored.items() if name.startswith("out/")}
    if "l1" in out:
        assert_close(np.array([lorahub.penalty(np.array(params["weights"]))]), out["l1"], case["tolerance"], "l1")
    wanted = {name.removesuffix(".delta"): values for name, values in out.items() if name.endswith(".delta")}
    wanted = wanted or {
        name.removesuffix(".lora_A.weight"): out[name.replace("lora_A", "lora_B")] @ values
        for name, values in out.items()
        if name.endswith(".lora_A.weight")
    }
    assert merged.keys() == wanted.keys()
    rank = output_rank(method, params, experts) or total_rank(experts)
    # The reference keeps use_rslora of the first adapter with lora_alpha = rank, so its scaling is sqrt(rank), not 1.
    excess = math.sqrt(rank) if params.get("use_rslora") else 1.0
    for module, result in merged.items():
        delta = result.delta() if isinstance(result, Factors) else result
        assert_close(excess * delta, wanted[module], case["tolerance"], module)
        if method == "cat" and f"out/{module}.lora_A.weight" in stored:
            A, B = stored[f"out/{module}.lora_A.weight"], stored[f"out/{module}.lora_B.weight"]
            assert not A[result.rank :].any()
            assert_close(result.A, A[: result.rank], case["tolerance"], f"{module} A")
            assert_close(result.B, B[:, : result.rank], case["tolerance"], f"{module} B")


PARTED = {"twin_merging", "one_bit"}


def check_exclusive_parts(method, parameters, experts, stored, tolerance):
    """The part of every expert that the shared one leaves, as it comes back out of its code."""
    digests = [f"{position:04}" for position in range(len(experts))]
    found = arrays.split(method, experts, parameters=parameters, digests=digests)
    for position, expert in enumerate(experts):
        for name in expert:
            part = found.exclusive(name, position).part
            assert_close(part.delta(), stored[f"out/{position}/{name}"], tolerance, name)
    for name in expert:
        if f"merged/{name}" in stored:
            assert_close(found.shared(name), stored[f"merged/{name}"], tolerance, name)


def output_rank(method, params, experts):
    """The rank the reference truncates to; None where its result is exact."""
    if params.get("svd_rank"):
        return params["svd_rank"]
    if "svd" in str(params.get("combination_type", "")):
        return max(found.rank for expert in experts for found in expert.values())
    return None


def total_rank(experts):
    modules = {module for expert in experts for module in expert}
    return max(sum(expert[module].rank for expert in experts if module in expert) for module in modules)


def check_statistics(method, parameters, expert, stored, tolerance):
    """Survivors have the value stated, and over many seeds each value survives as often as stated."""
    for name, values in expert.items():
        survivor = stored[f"out/{name}.survivor_value"]
        # The value of a zero says nothing about whether it survived.
        live = (values != 0) & (survivor != 0)
        share = stored.get(f"out/{name}.keep_probability")
        if share is None:
            share = np.full(values.shape, parameters["density"])
        else:
            checked = merging.catalogue()[method].parse(parameters)
            found = della.keep_probability(values.reshape(-1, values.shape[-1]), checked).reshape(values.shape)
            np.testing.assert_allclose(found, share, rtol=1e-5)
        total, counts = np.zeros(values.shape), np.zeros(values.shape)
        for seed in range(SEEDS):
            out = arrays.merge(method, [expert], parameters=parameters, seed=seed, digests=["a"])[name]
            kept = out != 0
            assert_close(out[kept], survivor[kept], tolerance, f"{name}, seed {seed}")
            total += out
            counts += kept
        spread = np.sqrt(share * (1 - share) / SEEDS)
        z = ((counts / SEEDS - share) / spread)[live]
        assert abs(z.mean()) < 5 / math.sqrt(z.size)
        assert abs(z.std() - 1) < 0.1
        errors = ((total / SEEDS - values) / (np.abs(survivor) * spread + 1e-30))[live]
        assert abs(errors.mean()) < 5 / math.sqrt(errors.size)
        again = arrays.merge(method, [expert], parameters=parameters, seed=1, digests=["a"])[name]
        other = arrays.merge(method, [expert], parameters=parameters, seed=1, digests=["b"])[name]
        np.testing.assert_array_equal(
            again, arrays.merge(method, [expert], parameters=parameters, seed=1, digests=["a"])[name]
        )
        assert ((again != 0) != (other != 0)).any()


def read_experts(stored, count, *, dtype):
    """Deltas by tensor name, or LowRank records by module, per expert."""
    experts = []
    for position in range(count):
        prefix = f"expert.{position}/"
        own = {name.removeprefix(prefix): values for name, values in stored.items() if name.startswith(prefix)}
        modules = {name.removesuffix(".lora_A.weight") for name in own if name.endswith(".lora_A.weight")}
        if modules:
            experts.append(
                {
                    module: LowRank(
                        own[f"{module}.lora_A.weight"].astype(dtype),
                        own[f"{module}.lora_B.weight"].astype(dtype),
                        float(own.get(f"{module}.scaling", np.ones(1)).ravel()[0]),
                    )
                    for module in modules
                }
            )
        else:
            experts.append({name: values.astype(dtype) for name, values in own.items()})
    return experts


KINDS = {"fisher": "fisher_diag", "gram": "gram_in", "gram_out": "gram_out"}


def read_statistics(stored, experts, params):
    """What is stored beside the experts' values; Gram matrices are stored by module, not by weight."""
    found = [{kind: {} for kind in KINDS.values()} for _ in experts]
    for name, values in stored.items():
        folder, _, tensor = name.partition("/")
        kind, _, position = folder.rpartition(".")
        if kind in KINDS:
            own = experts[int(position)]
            found[int(position)][KINDS[kind]][tensor if tensor in own else f"{tensor}.weight"] = values
    for position, values in enumerate(np.transpose(stored.get("lambda/raw", np.zeros((0, 0))))):
        found[position]["coefficients"] = dict(zip(params["lambdas_order"], values, strict=True))
    for position, loss in enumerate(params.get("losses", [])):
        found[position]["loss"] = {"*": loss}
    return found


def assert_close(got, wanted, tolerance, name):
    assert got.shape == wanted.shape, name
    allowed = tolerance["atol"] + tolerance["rtol"] * np.abs(wanted.astype(np.float64))
    excess = np.abs(got.astype(np.float64) - wanted) / allowed
    assert (excess <= 1).all(), f"{name}: {np.count_nonzero(excess > 1)} values off, the worst {excess.max():.3g} times"


def weights_of(params, count):
    weights = params.get("weights", params.get("coefficients"))
    # The weights stored beside losses are what the losses come to.
    if isinstance(weights, list) and "losses" not in params:
        return weights
    # Spherical interpolation between two has a position in place of their weights.
    return [1 - params["t"], params["t"]] if "t" in params else [1.0] * count


def plain_value(params, name, default):
    """A parameter, or the default where it is absent or null."""
    return default if params.get(name) is None else params[name]


def density_of(params):
    for name in ("density", "keep_fraction", "keep_top"):
        if name in params:
            return params[name]
    for name in ("drop_rate", "mask_rate"):
        if name in params:
            return round(1 - params[name], 12)
    return params.get("topK_percent", 100) / 100


def scope_of(params):
    scope = str(params.get("scope", "tensor"))
    return next((known for known in ("global", "row") if scope.startswith(known)), "tensor")


def min_keep_of(params, default):
    return int(params.get("min_keep", default))


def linear(params):
    return "linear", {"normalize": plain_value(params, "normalize", False)}


def task_arithmetic(params):
    return "task_arithmetic", {
        "scale": plain_value(params, "scale", 1.0),
        "normalize": plain_value(params, "normalize", False),
    }


def magnitude_prune(params):
    return "magnitude_prune", {
        "density": density_of(params),
        "scope": scope_of(params),
        "min_keep": min_keep_of(params, 0 if "combination_type" in params else 1),
        "scale": plain_value(params, "scale", 1.0),
        "normalize": plain_value(params, "normalize", False),
    }


def ties(params):
    election, merge = str(params.get("elect", "")), str(params.get("merge", "mean"))
    if "threshold_rule" in params or "keep_fraction" in params:
        variant = "release"
    elif "combination_type" in params or "majority_sign_method" in params or "UNWEIGHTED" in election.upper():
        variant = "peft"
    else:
        variant = "mergekit"
    parameters = {
        "variant": variant,
        "density": density_of(params),
        "scale": plain_value(params, "scale", 1.0),
        "elect": params.get("majority_sign_method", "total"),
        "aggregate": next((word for word in ("mean", "sum", "max") if merge.endswith(f"dis-{word}")), "mean"),
        "normalize": plain_value(params, "normalize", True),
    }
    if "scope" in params:
        parameters["scope"] = scope_of(params)
    if "min_keep" in params:
        parameters["min_keep"] = params["min_keep"]
    if "zero_sign" in params:
        parameters["zero_sign"] = "majority" if "majority" in params["zero_sign"] else "positive"
    return "ties", parameters


def dare(params):
    return "dare", {
        "density": density_of(params),
        "rescale": "l1" if "l1" in str(params.get("rescale", "")) else "density",
        "elect": "ties" if "elect" in params else "none",
        "normalize": plain_value(params, "normalize", False),
        "scale": plain_value(params, "scale", 1.0),
    }


def della_drop(params):
    epsilon = params["epsilon"] if "epsilon" in params else params["window_size"] / 2
    return "della", {
        "density": density_of(params), "epsilon": epsilon, "elect": "none", "normalize": False, "scale": 1.0,
    }  # fmt: skip


def breadcrumbs(params):
    return "breadcrumbs", {
        "density": density_of(params),
        "gamma": params["gamma"] if "gamma" in params else params["remove_top"],
        "scope": scope_of(params),
        "scale": plain_value(params, "scale", 1.0),
        "normalize": plain_value(params, "normalize", False),
    }


def magmax(params):
    tie = next((word for word in ("first", "mean") if word in str(params.get("tie", ""))), "last")
    return "magmax", {"scale": plain_value(params, "scale", 1.0), "tie": tie}


def sce(variant):
    return lambda params: ("sce", {"select": params["select_topk"], "variant": variant})


def pcb(params):
    return "pcb", {"ratio": params["ratio"], "scale": plain_value(params, "scale", 1.0)}


def consensus_ta(params):
    return "consensus_ta", {
        "threshold": params["tall_lambda"], "min_experts": params["min_tasks"], "scale": plain_value(params, "scale", 1.0),
    }  # fmt: skip


def iso_cts(params):
    return "iso_cts", {"common": params["common_space_fraction"], "scale": plain_value(params, "scale", 1.0)}


def scaled(method):
    return lambda params: (method, {"scale": plain_value(params, "scale", 1.0)})


def opcm(params):
    return "opcm", {"alpha": params["alpha"]}


def fisher(params):
    return "fisher", {
        "floor": params["min_fisher"],
        "floor_by": "max" if params["floor"] == "max" else "add",
        "equalize": params["normalize"],
    }


def regmean(params):
    return "regmean", {"off_diagonal": params["off_diagonal_ratio"]}


def mats(params):
    return "mats", {
        "objective": "input_output" if "K-FAC" in params["objective"] else "input",
        "iterations": params["iterations"],
        "off_diagonal": params["model_lambda"],
        "start": params["init"],
    }


def twin_merging(params):
    return "twin_merging", {
        "compress": params["compress"],
        # The reference floors in binary, where 1 - 0.8 falls short of 0.2 and one value less is kept.
        "density": 1 - params["mask_rate"] - (1e-7 if params["compress"] == "magnitude" else 0),
        "scale": float(params["shared"].split()[-1]),
    }


def one_bit(_params):
    return "one_bit", {"scale": 0.0}


def knots(params):
    return "knots", {
        "inner": {"tv": "sum"}.get(params["inner"], params["inner"]),
        "density": params["topK_percent"] / 100,
        "aggregate": params["merging_type"],
        "scale": plain_value(params, "scale", 1.0),
    }


def slerp(params):
    return "slerp", {"t": params["t"], "threshold": params["dot_threshold"]}


def nuslerp(params):
    return "nuslerp", {"scope": "tensor" if plain_value(params, "flatten", True) else "row"}


def multislerp(params):
    return "multislerp", {"normalize": plain_value(params, "normalize_weights", True)}


def karcher(params):
    return "karcher", {"steps": params["max_iter"], "tolerance": params["tol"]}


def lorahub_release(_params):
    return "lorahub", {"composition": "release"}


def lm_cocktail(params):
    return "lm_cocktail", {"temperature": params["temperature"]}


def peft_ties(params):
    return "peft_ties", {"density": params["density"], "elect": params.get("majority_sign_method", "total")}


def plain(method):
    return lambda _params: (method, {})


TRANSLATIONS = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "magnitude_prune": magnitude_prune,
    "ties": ties,
    "dare": dare,
    "della": della_drop,
    "breadcrumbs": breadcrumbs,
    "magmax": magmax,
    "sce": sce("mergekit"),
    "sce_fuseai": sce("fuseai"),
    "pcb": pcb,
    "consensus_ta": consensus_ta,
    "fisher": fisher,
    "regmean": regmean,
    "mats": mats,
    "twin_exclusive": twin_merging,
    "one_bit": one_bit,
    "knots": knots,
    "iso_c": scaled("iso_c"),
    "iso_cts": iso_cts,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "tsv_m": scaled("tsv_m"),
    "opcm": opcm,
    "cat": plain("cat"),
    "svd": plain("svd"),
    "lorahub": lorahub_release,
    "lm_cocktail": lm_cocktail,
    "adamerging": plain("adamerging"),
    "lora_cat": plain("cat"),
    "lora_linear": plain("peft_linear"),
    "lora_ties": peft_ties,
    "lora_svd": plain("svd"),
    "lora_ties_svd": ties,
    "lora_magnitude_prune_svd": magnitude_prune,
}
