"""Shapes of requests and answers: requests are checked by these, answers documented by them."""

from typing import Any

from drf_spectacular.utils import OpenApiResponse
from rest_framework import serializers as s

from moerge.merging.recipe import KINDS
from registry.models import ApiKey, Expert, Job, Merge
from registry.services import route_merges


class StrictSerializer(s.Serializer[Any]):
    """A request whose unknown fields are refused by name, so that a misspelt one is never ignored."""

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = sorted(set(data) - set(self.fields))
            if unknown:
                known = ", ".join(sorted(self.fields))
                raise s.ValidationError(dict.fromkeys(unknown, f"This field is not known. Known: {known}."))
        return super().to_internal_value(data)


class FaultRecord(s.Serializer[Any]):
    pointer = s.CharField(help_text="The field: a JSON pointer, a file or tensor name, or a header.")
    met = s.JSONField(allow_null=True)
    wanted = s.JSONField(allow_null=True)
    remedy = s.CharField(required=False)
    rule = s.CharField(required=False)


class Problem(s.Serializer[Any]):
    """RFC 9457."""

    type = s.CharField()
    title = s.CharField()
    status = s.IntegerField()
    detail = s.CharField()
    code = s.CharField()
    request_id = s.CharField()
    errors = FaultRecord(many=True)  # type: ignore[assignment]
    job = s.CharField(required=False, help_text="The job that makes what was asked for, or that failed to.")
    job_url = s.CharField(required=False)


def problems(*statuses: int) -> dict[Any, OpenApiResponse]:
    """The error answers of an operation. Every operation may also be throttled or meet a server that is away."""
    meanings = {
        400: "The body or the address cannot be parsed.",
        401: "No key, or a key that is not valid.",
        403: "Known but not allowed.",
        404: "Absent, or hidden from the caller.",
        405: "This address does not know the method.",
        409: "In conflict with the present state.",
        412: "The branch has moved since.",
        413: "Too large.",
        415: "This media type is not taken here.",
        416: "The range does not fit.",
        422: "Well-formed but wrong.",
        429: "Too many requests; Retry-After says when.",
        500: "An error of the hub.",
        503: "Something is away for the moment; Retry-After says when.",
    }
    wanted = sorted({*statuses, 400, 401, 405, 429, 503})
    return {
        (status, "application/problem+json"): OpenApiResponse(Problem, description=meanings[status])
        for status in wanted
    }


class ExpertRow(s.Serializer[Any]):
    expert = s.CharField(help_text="owner/name")
    visibility = s.ChoiceField(Expert.Visibility.choices)
    base_model = s.CharField(allow_null=True)
    description = s.CharField(allow_blank=True)
    adapter_kind = s.CharField(allow_null=True)
    rank = s.IntegerField(allow_null=True)
    licence = s.CharField(allow_null=True)
    tags = s.ListField(child=s.CharField())
    downloads = s.IntegerField()
    yanked = s.BooleanField()
    created_at = s.DateTimeField()
    updated_at = s.DateTimeField()


class ExpertPage(s.Serializer[Any]):
    items = ExpertRow(many=True)
    next = s.CharField(allow_null=True)


class JobRecord(s.Serializer[Any]):
    id = s.CharField()
    kind = s.CharField()
    state = s.ChoiceField(Job.State.choices)
    progress = s.FloatField(help_text="Share done, 0 to 1.")
    message = s.CharField(allow_blank=True)
    error = s.JSONField(allow_null=True)
    result = s.JSONField(allow_null=True)
    attempt = s.IntegerField()
    created_at = s.DateTimeField()
    started_at = s.DateTimeField(allow_null=True)
    finished_at = s.DateTimeField(allow_null=True)


class FileRecord(s.Serializer[Any]):
    path = s.CharField()
    size = s.IntegerField(help_text="Bytes.")
    sha256 = s.CharField()
    url = s.CharField()


class CompressedRecord(s.Serializer[Any]):
    bytes = s.IntegerField()
    original_bytes = s.IntegerField(help_text="The same tensors at two bytes a value.")
    density = s.FloatField()
    recipe = s.CharField(help_text="The ComPEFT preset.")
    cosine = s.FloatField(allow_null=True)
    sha256 = s.CharField()
    report = s.JSONField()
    url = s.CharField()


class FormRecord(s.Serializer[Any]):
    """One compressed form."""

    preset = s.CharField()
    scale_rule = s.CharField(allow_null=True)
    alpha = s.FloatField(allow_null=True)
    density = s.FloatField(help_text="Share of values kept; 1 for int4.")
    is_default = s.BooleanField(help_text="The one that is served when none is named.")
    bytes = s.IntegerField()
    original_bytes = s.IntegerField(help_text="The ternary tensors at two bytes a value.")
    ternary_ratio = s.FloatField(allow_null=True, help_text="How many times smaller than bf16 those tensors alone are.")
    ratio = s.FloatField(
        allow_null=True, help_text="How many times smaller the whole weights file is, with what stays as it is."
    )
    kept = s.IntegerField(allow_null=True)
    cosine = s.FloatField(allow_null=True)
    product_cosine = s.FloatField(allow_null=True, help_text="Of the delta B·A, over all modules.")
    product_rel_error = s.FloatField(allow_null=True, help_text="Of the delta B·A, over all modules.")
    sigma_ratio = s.FloatField(allow_null=True, help_text="Standard deviation of A over that of B.")
    warnings = s.ListField(child=s.CharField())
    sha256 = s.CharField()
    accuracy = s.FloatField(allow_null=True, help_text="Where the card states one for this form.")
    url = s.CharField()


class EvaluationRecord(s.Serializer[Any]):
    dataset = s.CharField()
    metric = s.CharField()
    value = s.FloatField()
    base_value = s.FloatField(allow_null=True)
    row_count = s.IntegerField(allow_null=True)
    source = s.CharField()  # type: ignore[assignment]
    preset = s.CharField(allow_null=True, help_text="Of the compressed form that was measured; null: the original.")
    density = s.FloatField(allow_null=True)


class ExpertRecord(ExpertRow):
    examples = s.ListField(child=s.CharField())
    instruction = s.CharField(allow_blank=True, help_text="What it does, as an order to somebody.")
    is_instruction_generated = s.BooleanField(help_text="A language model wrote it from description and examples.")
    yank_reason = s.CharField(allow_null=True)
    state = s.ChoiceField(["incomplete", "processing", "ready", "failed"])
    revision = s.CharField(allow_null=True, help_text="Full commit of main.")
    files = FileRecord(many=True)
    jobs = JobRecord(many=True)
    compressed = CompressedRecord(allow_null=True)
    compressed_forms = FormRecord(many=True)
    has_gates = s.BooleanField(help_text="Whether it comes with token-level gates (PHATGOOSE, GLIDER).")
    same_weights = s.ListField(
        child=s.CharField(), help_text="Experts that you may see whose weights do the same, however they are factored."
    )
    facts = s.JSONField()
    evaluations = EvaluationRecord(many=True)


class ExpertChange(StrictSerializer):
    visibility = s.ChoiceField(Expert.Visibility.choices, required=False)
    yanked = s.BooleanField(required=False)
    yank_reason = s.CharField(required=False, allow_blank=True, max_length=300)


class ExpertCreate(StrictSerializer):
    expert = s.CharField(max_length=200, help_text="owner/name")
    private = s.BooleanField(required=False, default=False)


class RevisionRow(s.Serializer[Any]):
    revision = s.CharField()
    parent = s.CharField(allow_null=True)  # type: ignore[assignment]
    state = s.CharField()
    message = s.CharField(allow_blank=True)
    author = s.CharField(allow_null=True)
    created_at = s.DateTimeField()


class RevisionPage(s.Serializer[Any]):
    items = RevisionRow(many=True)
    next = s.CharField(allow_null=True)


class RouteFilters(StrictSerializer):
    owner = s.CharField(required=False, max_length=96)
    tags = s.ListField(child=s.CharField(max_length=80), required=False, max_length=16)
    licence = s.CharField(required=False, max_length=64)
    experts = s.ListField(
        child=s.CharField(max_length=200), required=False, max_length=64, help_text="owner/name: nobody else."
    )


class RouteWish(StrictSerializer):
    """What holds of any query: among whom to look, how many to name, and how good they must be."""

    base_model = s.CharField(required=False, allow_null=True, max_length=200)
    top_k = s.IntegerField(required=False, default=10, min_value=1, max_value=50)
    filters = RouteFilters(required=False)
    min_score = s.FloatField(required=False, allow_null=True, min_value=0, max_value=1)
    min_seq = s.IntegerField(required=False, allow_null=True, min_value=0)
    explain = s.BooleanField(required=False, default=False)


class RouteRequest(RouteWish):
    text = s.CharField(required=False, trim_whitespace=False)
    texts = s.ListField(child=s.CharField(trim_whitespace=False), required=False, min_length=1, max_length=32)
    strategy = s.CharField(required=False, max_length=40)


class RouteVectorRequest(RouteWish):
    """A vector that the caller made by the hub's own encoder; only meaning is compared."""

    vector = s.ListField(child=s.FloatField(), max_length=4096, help_text="As many values as the encoder's, length 1.")
    embedding_model = s.CharField(max_length=120, help_text="As `POST /api/v1/route` names it.")


class RouteResult(s.Serializer[Any]):
    expert = s.CharField()
    revision = s.CharField()
    score = s.FloatField()
    base_model = s.CharField()
    confidence = s.ChoiceField(["high", "medium", "low"])
    parts = s.JSONField(help_text="s_ex, s_desc, s_cen (without an encoder absent) and bm25.")
    matched_example_index = s.IntegerField(allow_null=True, help_text="Which example of the card is nearest, from 0.")
    matched_example = s.CharField(required=False, help_text="Its text, with `explain`.")


class RouteAnswer(s.Serializer[Any]):
    results = RouteResult(many=True, required=False)
    abstained = s.BooleanField(required=False)
    best_score = s.FloatField(required=False, allow_null=True, help_text="Of what the caller may see, also below it.")
    min_score = s.FloatField(required=False, help_text="The threshold that was used.")
    default_min_score = s.FloatField(required=False, help_text="The threshold where the request names none.")
    strategy = s.CharField(required=False)
    degraded = s.BooleanField(required=False, help_text="Words alone decided, because the encoder is still loading.")
    answers = s.ListField(child=s.JSONField(), required=False, help_text="One answer for each of `texts`.")
    index_seq = s.IntegerField()
    embedding_model = s.CharField(allow_null=True)


class PreviewRequest(StrictSerializer):
    """A card that nobody has uploaded yet."""

    base_model = s.CharField(max_length=200)
    name = s.CharField(max_length=200, help_text="Of the expert; as owner/name, the expert of that name is left out.")
    description = s.CharField(required=False, default="", allow_blank=True, trim_whitespace=False)
    examples = s.ListField(child=s.CharField(trim_whitespace=False), required=False, default=list, max_length=32)
    instruction = s.CharField(required=False, default="", allow_blank=True, trim_whitespace=False)
    tags = s.ListField(child=s.CharField(max_length=80), required=False, default=list, max_length=64)


class PreviewLevel(s.Serializer[Any]):
    """What cards of so many examples reached on the development queries of docs/routing.md."""

    examples = s.IntegerField(help_text="This many; the last level: or more.")
    recall_1 = s.FloatField(help_text="Share of queries whose expert comes first.")
    recall_5 = s.FloatField()


class PreviewWinner(s.Serializer[Any]):
    expert = s.CharField()
    score = s.FloatField()


class PreviewText(s.Serializer[Any]):
    index = s.IntegerField(help_text="Which example, from 0.")
    rank = s.IntegerField(help_text="Among the visible experts of the base; 1: the draft comes first.")
    score = s.FloatField(help_text="Of the draft without this example.")
    would_be_routed = s.BooleanField(help_text="First, and not below the default threshold.")
    winners = PreviewWinner(many=True, help_text="The first three that come before it.")


class PreviewAnswer(s.Serializer[Any]):
    quality = s.ChoiceField(["low", "fair", "good"], help_text="0, 1 to 4, 5 or more examples.")
    expected = PreviewLevel()
    levels = PreviewLevel(many=True)
    texts = PreviewText(many=True)
    routed = s.IntegerField(help_text="How many of the examples would be routed to the draft.")
    index_seq = s.IntegerField()


class Share(s.FloatField):
    """A share, 0 to 1, or null where there was nothing to take a share of."""

    def __init__(self, **more: Any) -> None:
        super().__init__(min_value=0, max_value=1, **more)


class EvaluatedSuite(StrictSerializer):
    suite = s.CharField(max_length=40)
    queries = s.IntegerField(min_value=1, max_value=1_000_000)
    recall_1 = Share()
    recall_5 = Share()
    recall_10 = Share()
    mrr = Share()


class EvaluatedBand(StrictSerializer):
    confidence = s.ChoiceField(["high", "medium", "low"])
    in_scope = s.IntegerField(min_value=0, max_value=1_000_000)
    right = s.IntegerField(min_value=0, max_value=1_000_000)
    out_of_scope = s.IntegerField(min_value=0, max_value=1_000_000)


class EvaluatedConfusion(StrictSerializer):
    gold = s.CharField(max_length=200, help_text="The expert that ought to have come first.")
    found = s.CharField(max_length=200, help_text="The expert that did.")
    queries = s.IntegerField(min_value=1, max_value=1_000_000)


class EvaluationFigures(StrictSerializer):
    """As `moerge eval-router --json` prints them; what needs queries of a kind that was not there is null."""

    in_scope = s.IntegerField(min_value=0, max_value=1_000_000)
    out_of_scope = s.IntegerField(min_value=0, max_value=1_000_000)
    recall_1 = Share(allow_null=True)
    recall_5 = Share(allow_null=True)
    recall_10 = Share(allow_null=True)
    mrr = Share(allow_null=True)
    macro_recall_1 = Share(allow_null=True)
    macro_recall_5 = Share(allow_null=True)
    macro_recall_10 = Share(allow_null=True)
    auroc = Share(allow_null=True)
    threshold = Share()
    kept = Share(allow_null=True)
    recall_1_of_kept = Share(allow_null=True)
    let_through = Share(allow_null=True)
    suites = s.ListField(child=EvaluatedSuite(), max_length=64)
    calibration = s.ListField(child=EvaluatedBand(), max_length=3)
    confusions = s.ListField(child=EvaluatedConfusion(), max_length=20)


class EvaluationRequest(StrictSerializer):
    base_model = s.CharField(allow_null=True, max_length=200)
    strategy = s.CharField(max_length=40)
    index_seq = s.IntegerField(min_value=0)
    figures = EvaluationFigures()


class RouterEvaluation(s.Serializer[Any]):
    id = s.IntegerField()
    base_model = s.CharField(allow_null=True)
    strategy = s.CharField()
    index_seq = s.IntegerField()
    figures = EvaluationFigures()
    created_by = s.CharField(allow_null=True)
    created_at = s.DateTimeField()


class EvaluationPage(s.Serializer[Any]):
    items = RouterEvaluation(many=True)
    next = s.CharField(allow_null=True)


class MergeExpert(StrictSerializer):
    expert = s.CharField(max_length=200)
    revision = s.CharField(required=False, allow_null=True, max_length=200)
    weight = s.JSONField(required=False, help_text="A finite number; 1 when left out.")


class MergeOutput(StrictSerializer):
    kind = s.ChoiceField(KINDS, required=False, help_text="`lora`; where all experts are IA3, `ia3`.")
    rank = s.JSONField(required=False, allow_null=True, help_text='A number, or {"energy": 0.95}.')
    dtype = s.CharField(required=False, allow_null=True)
    density = s.FloatField(required=False, allow_null=True, help_text="Share of values kept by ternary output.")
    saved = s.CharField(required=False, allow_null=True, help_text="The expert whose saved modules are kept.")


class MergeRequest(s.Serializer[Any]):
    """Checked in full by the recipe itself, which names method, parameter and range."""

    base_model = s.CharField(required=False, allow_null=True)
    method = s.CharField()
    parameters = s.DictField(required=False)
    seed = s.IntegerField(required=False)
    experts = MergeExpert(many=True)
    output = MergeOutput(required=False)
    start = s.BooleanField(required=False, help_text="False: compute it when somebody reads it.")
    licence = s.CharField(required=False, max_length=64, help_text="A label for the result; refused where it hides.")
    acknowledge_licences = s.BooleanField(required=False, help_text="Answer for licences that are not known.")


class Restriction(s.Serializer[Any]):
    verdict = s.ChoiceField(["warn", "block"])
    parents = s.ListField(child=s.CharField())
    rule = s.CharField()
    detail = s.CharField()


class LicenceRecord(s.Serializer[Any]):
    """Information, not legal advice."""

    verdict = s.ChoiceField(["ok", "warn", "block"])
    licence = s.CharField(help_text="Of the result; `other` where several hold at once or one is not known.")
    classes = s.ListField(child=s.CharField())
    carried = s.ListField(child=s.CharField(), help_text="Licences whose conditions the result carries on.")
    reasons = Restriction(many=True)
    notices = s.ListField(child=s.CharField(), help_text="The licence of every parent and of the base.")
    acknowledged = s.JSONField(allow_null=True, help_text="Who answered for unknown licences, and when.")
    acknowledgement_needed = s.BooleanField()


class MergeCheckExpert(s.Serializer[Any]):
    expert = s.CharField()
    revision = s.CharField()
    kind = s.CharField()
    family = s.ChoiceField(["lora", "ia3"])
    rank = s.IntegerField(allow_null=True)
    modules = s.IntegerField(allow_null=True)
    missing_count = s.IntegerField(help_text="Modules that others have and this expert lacks.")
    missing = s.ListField(child=s.CharField(), help_text="The first twenty of them.")
    licence = s.CharField(allow_null=True)


class MergeCheckOutput(s.Serializer[Any]):
    kind = s.CharField(help_text="lora, ia3, delta, ternary or full.")
    rank = s.IntegerField(allow_null=True)
    bytes = s.IntegerField(allow_null=True, help_text="Of the weights, at most.")


class MergeCost(s.Serializer[Any]):
    memory_bytes = s.IntegerField()
    written_bytes = s.IntegerField()
    cpu_seconds = s.FloatField(help_text="Of one core, roughly.")


class KinshipPair(s.Serializer[Any]):
    first = s.CharField()
    second = s.CharField()
    cosine = s.FloatField()
    pearson = s.FloatField()
    distance = s.FloatField()
    conflict = s.FloatField(help_text="Share of values that both change and that have opposite signs.")


class KinshipRecord(s.Serializer[Any]):
    state = s.CharField(help_text="ready, measuring, failed or partial.")
    job = s.CharField(allow_null=True)
    reason = s.CharField(required=False, help_text="Why no job measures the pairs that are not known.")
    pairs = KinshipPair(many=True)


class MergeCheckRecord(s.Serializer[Any]):
    """What a recipe would give, from rows alone."""

    ok = s.BooleanField()
    digest = s.CharField()
    repo = s.CharField()
    commit = s.CharField()
    state = s.CharField(allow_null=True, help_text="As of the merge; null: nobody has registered it yet.")
    recipe = s.JSONField()
    warnings = s.ListField(child=s.CharField())
    experts = MergeCheckExpert(many=True)
    output = MergeCheckOutput()
    cost = MergeCost(allow_null=True)
    licence = LicenceRecord()
    kinship = KinshipRecord()


class MergeParentRecord(s.Serializer[Any]):
    expert = s.CharField(allow_null=True)
    revision = s.CharField()
    weight = s.FloatField()
    yanked = s.BooleanField()


class MergeRecord(s.Serializer[Any]):
    id = s.CharField()
    digest = s.CharField()
    state = s.ChoiceField(Merge.State.choices)
    repo = s.CharField(help_text="The repository name that download clients use.")
    commit = s.CharField(help_text="Known before the merge is computed.")
    base_model = s.CharField()
    method = s.CharField()
    recipe = s.CharField(help_text="Canonical JSON.")
    parents = MergeParentRecord(many=True)
    job = JobRecord(allow_null=True)
    report = s.JSONField()
    licence = s.JSONField(help_text="What the licences of the parents and of the base say together.")
    files = FileRecord(many=True)
    created_at = s.DateTimeField()
    finished_at = s.DateTimeField(allow_null=True)


class RouteMergeRequest(StrictSerializer):
    text = s.CharField(trim_whitespace=False)
    base_model = s.CharField(
        required=False, allow_null=True, max_length=200, help_text="Needed where experts of several bases fit."
    )
    top_k = s.IntegerField(required=False, default=3, min_value=1, max_value=16)
    filters = RouteFilters(required=False)
    min_score = s.FloatField(required=False, allow_null=True, min_value=0, max_value=1)
    min_seq = s.IntegerField(required=False, allow_null=True, min_value=0)
    temperature = s.FloatField(
        required=False,
        default=route_merges.TEMPERATURE,
        min_value=0.001,
        max_value=1000,
        help_text="Weights are the softmax of scores over it: small gives the best expert all, large gives all alike.",
    )
    method = s.CharField(required=False, default="linear", max_length=40)
    parameters = s.DictField(required=False)
    seed = s.IntegerField(required=False)
    output = MergeOutput(required=False)
    start = s.BooleanField(required=False, default=True, help_text="False: compute it when somebody reads it.")
    licence = s.CharField(required=False, max_length=64)
    acknowledge_licences = s.BooleanField(required=False)


class SkippedRecord(s.Serializer[Any]):
    expert = s.CharField()
    revision = s.CharField()
    reason = s.CharField()


class RouteMergeAnswer(s.Serializer[Any]):
    route = RouteResult(many=True, help_text="The experts that were merged.")
    skipped = SkippedRecord(many=True, help_text="Experts that fit and cannot be merged with the better ones.")
    index_seq = s.IntegerField()
    recipe = s.CharField(help_text="Canonical JSON.")
    merge = MergeRecord()


class MergePage(s.Serializer[Any]):
    items = MergeRecord(many=True)
    next = s.CharField(allow_null=True)


class MethodRecord(s.Serializer[Any]):
    family = s.CharField()
    name = s.CharField()
    version = s.CharField()
    spec = s.JSONField()


class MethodList(s.Serializer[Any]):
    items = MethodRecord(many=True)
    next = s.CharField(allow_null=True)


class KeyRequest(StrictSerializer):
    name = s.CharField(max_length=80)
    scopes = s.ListField(child=s.ChoiceField(ApiKey.SCOPES), min_length=1, max_length=8)
    expires_at = s.DateTimeField(required=False, allow_null=True)


class KeyRecord(s.Serializer[Any]):
    id = s.IntegerField()
    name = s.CharField()
    prefix = s.CharField()
    scopes = s.ListField(child=s.CharField())
    created_at = s.DateTimeField()
    expires_at = s.DateTimeField(allow_null=True)
    last_used_at = s.DateTimeField(allow_null=True)


class NewKeyRecord(KeyRecord):
    key = s.CharField(help_text="Shown once, here.")


class KeyPage(s.Serializer[Any]):
    items = KeyRecord(many=True)
    next = s.CharField(allow_null=True)


class BaseRequest(StrictSerializer):
    name = s.CharField(max_length=200)
    licence = s.CharField(required=False, allow_blank=True, max_length=64)
    architecture = s.CharField(required=False, allow_blank=True, max_length=64)


class BaseRecord(s.Serializer[Any]):
    name = s.CharField()
    architecture = s.CharField(allow_null=True)
    licence = s.CharField(allow_null=True)
    parameter_count = s.IntegerField(allow_null=True)
    aliases = s.ListField(child=s.CharField())


class BasePage(s.Serializer[Any]):
    items = BaseRecord(many=True)
    next = s.CharField(allow_null=True)


class HashRecord(s.Serializer[Any]):
    sha256 = s.CharField()
    size = s.IntegerField()
    found_in = s.ListField(child=s.JSONField())
