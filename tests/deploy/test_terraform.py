"""
deploy/terraform: formatted, valid, and what a plan would make and grant.

Google's provider is not needed: a stand-in (`standin_provider.py`) declares the types that are used.  It runs in an
interpreter that has the package `tf`, which wants an older protobuf than the worker and so has an environment of its
own (`make test` makes it).
"""

import json
import os
import shutil
import sys
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import KUSTOMIZE
from tests.deploy.tools import DEPLOY, call, need_tool
from worker.brokers.admin.desired import BATCH_FILTER
from worker.settings.schema import PubSubSettings

pytestmark = pytest.mark.timeout(600)  # Terraform starts a provider for every plan

STANDIN = Path(__file__).with_name("standin_provider.py")


@cache
def _interpreter() -> str | None:
    """Return an interpreter that has `tf`: this one, or that of the environment beside it."""
    for python in (sys.executable, str(Path(sys.prefix) / "terraform" / "bin" / "python")):
        if Path(python).exists() and call(python, "-c", "import tf.runner").returncode == 0:
            return python
    return None


class Terraform:
    """The program in a copy of a configuration, with the stand-in as its provider."""

    def __init__(self, folder: Path, configuration: Path = DEPLOY / "terraform") -> None:
        python = _interpreter()
        if python is None:
            pytest.skip("no interpreter with the Python package tf; `make test` installs it")
        self._program = need_tool("terraform")
        self.folder = folder / "configuration"
        shutil.copytree(configuration, self.folder)
        plugins = folder / "plugins"
        plugins.mkdir()
        for name in ("google", "aws"):
            plugin = plugins / f"terraform-provider-{name}"
            plugin.write_text(f"#!{python}\n{STANDIN.read_text()}")
            plugin.chmod(0o755)
        settings = folder / "settings.tfrc"
        settings.write_text(
            f'provider_installation {{\n  dev_overrides {{\n    "hashicorp/google" = "{plugins}"\n'
            f'    "hashicorp/aws" = "{plugins}"\n  }}\n  direct {{}}\n}}\n'
        )
        self._environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "TF_CLI_CONFIG_FILE": str(settings),
            "TF_DATA_DIR": str(folder / "data"),
            "TF_IN_AUTOMATION": "1",
            "CHECKPOINT_DISABLE": "1",
        }

    def __call__(self, *arguments: str) -> tuple[int, str]:
        done = call(self._program, *arguments, cwd=self.folder, env=self._environ)
        return done.returncode, done.stdout + done.stderr

    def plan(self, **variables: str) -> dict[str, Any]:
        """Return the plan as Terraform writes it in JSON."""
        given = [f"-var={name}={value}" for name, value in (variables or {"project_id": "my-project"}).items()]
        code, text = self("plan", "-no-color", "-input=false", "-out=plan", *given)
        assert code == 0, text
        code, text = self("show", "-json", "plan")
        assert code == 0, text
        return dict(json.loads(text))


@pytest.fixture
def terraform(tmp_path: Path) -> Terraform:
    return Terraform(tmp_path)


@pytest.fixture
def role_in_aws(tmp_path: Path) -> Terraform:
    """The configuration of the worker's role in AWS."""
    return Terraform(tmp_path, DEPLOY / "terraform" / "sagemaker")


def test_files_are_formatted():
    """`terraform fmt` has nothing to change."""
    done = call(need_tool("terraform"), "fmt", "-check", "-recursive", "-diff", DEPLOY / "terraform")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_is_valid(terraform: Terraform):
    """References, arguments and types fit."""
    code, text = terraform("validate", "-no-color")
    assert code == 0, text


@pytest.mark.parametrize(
    ("right", "wrong", "word"),
    [
        ("ack_deadline_seconds ", "ack_deadline_second ", '"ack_deadline_second"'),
        ("google_pubsub_topic.responses.name", "google_pubsub_topic.answers.name", '"answers"'),
    ],
    ids=["argument", "reference"],
)
def test_a_mistake_is_found(terraform: Terraform, right: str, wrong: str, word: str):
    """A misspelt argument and a reference to nothing make it invalid."""
    for path in (terraform.folder / "main.tf", terraform.folder / "iam.tf"):
        path.write_text(path.read_text().replace(right, wrong))
    code, text = terraform("validate", "-no-color")
    assert code == 1
    assert word in text


def test_plans_are_as_promised(terraform: Terraform):
    """The configuration's own tests pass."""
    code, text = terraform("test", "-no-color")
    assert code == 0, text
    assert "0 failed" in text


def test_no_role_on_the_project_but_reading_metrics(terraform: Terraform):
    """Least privilege: every Pub/Sub role is on one topic or one subscription."""
    changes = terraform.plan()["resource_changes"]
    on_project = [item["change"]["after"]["role"] for item in changes if item["type"] == "google_project_iam_member"]
    assert on_project == ["roles/monitoring.viewer"]
    roles = {item["change"]["after"]["role"] for item in changes if item["type"].endswith("_iam_member")}
    assert roles == {
        "roles/monitoring.viewer",
        "roles/pubsub.publisher",
        "roles/pubsub.subscriber",
        "roles/pubsub.viewer",
    }


def test_manifests_and_infrastructure_name_the_same(terraform: Terraform):
    """The names Terraform makes by default are those in the overlay's values, the principal is the pod's account."""
    outputs = terraform.plan()["planned_values"]["outputs"]
    values = yaml.safe_load((KUSTOMIZE / "overlays" / "gke" / "values.yaml").read_text())["spec"]
    assert outputs["request_subscription"]["value"] == values["requestSubscription"]
    assert outputs["response_topic"]["value"] == values["responseTopic"]
    assert outputs["project_id"]["value"] == values["projectId"]
    space = yaml.safe_load((KUSTOMIZE / "overlays" / "gke" / "kustomization.yaml").read_text())["namespace"]
    account = yaml.safe_load((KUSTOMIZE / "base" / "serviceaccount.yaml").read_text())["metadata"]["name"]
    assert outputs["worker_principal"]["value"].endswith(f"/subject/ns/{space}/sa/{account}")


def test_manifests_of_batches_and_infrastructure_name_the_same(terraform: Terraform):
    """The names that Terraform makes for the Batches API are those in the overlay's values, the account is its own."""
    batches = '{bucket="my-project-inference-batches",location="EU"}'
    plan = terraform.plan(project_id="my-project", batches=batches)
    outputs = plan["planned_values"]["outputs"]
    values = yaml.safe_load((KUSTOMIZE / "overlays" / "gke" / "values.yaml").read_text())["spec"]["batches"]
    assert outputs["batches"]["value"] == {key: text for key, text in values.items() if key != "databasePort"}
    made = [item["change"]["after"] for item in plan["resource_changes"] if item["name"] == "batches"]
    assert {each["filter"] for each in made if "filter" in each} == {BATCH_FILTER}, "as `setup` makes them"
    space = yaml.safe_load((KUSTOMIZE / "overlays" / "gke" / "kustomization.yaml").read_text())["namespace"]
    account = yaml.safe_load((KUSTOMIZE / "components" / "batches" / "serviceaccount.yaml").read_text())
    wanted = f"/subject/ns/{space}/sa/{account['metadata']['name']}"
    assert outputs["batches_principal"]["value"].endswith(wanted)


def test_the_control_topic_keeps_what_workers_look_back_for(terraform: Terraform):
    """As long as `pubsub.control_remember_s` by default."""
    changes = terraform.plan(project_id="my-project", control="{}")["resource_changes"]
    (topic,) = [item["change"]["after"] for item in changes if item["name"] == "control" and "topic" in item["type"]]
    assert topic["message_retention_duration"] == f"{PubSubSettings().control_remember_s:.0f}s"


def test_exports_read_answers_and_bury_apart_from_requests(terraform: Terraform):
    """Both exports hang on the response topic; what cannot be written goes to a topic that nothing replays as requests."""
    given = {"responses_to_bigquery": '{dataset="d"}', "responses_to_storage": '{bucket="b"}'}
    plan = terraform.plan(project_id="my-project", **given)
    wired = {
        item["address"]: item["expressions"]
        for item in plan["configuration"]["root_module"]["resources"]
        if item["type"] == "google_pubsub_subscription"
    }
    for name in ("bigquery", "storage"):
        expressions = wired[f"google_pubsub_subscription.{name}"]
        (policy,) = expressions["dead_letter_policy"]
        assert "google_pubsub_topic.responses" in expressions["topic"]["references"]
        assert "google_pubsub_topic.unwritten" in policy["dead_letter_topic"]["references"]
    assert "google_pubsub_topic.unwritten" in wired["google_pubsub_subscription.unwritten"]["topic"]["references"]
    members = [item for item in plan["resource_changes"] if "unwritten" in item["address"] and "_iam_" in item["type"]]
    assert {(item["change"]["after"]["role"], item.get("index")) for item in members} == {
        ("roles/pubsub.publisher", 0),
        ("roles/pubsub.subscriber", "bigquery"),
        ("roles/pubsub.subscriber", "storage"),
    }


def _dataflow(start_before: datetime) -> str:
    return f'{{files="gs://f/*.jsonl",temp="gs://t/x",region="europe-west1",start_before="{start_before:%Y-%m-%dT%H:%M:%SZ}"}}'


def test_a_dataflow_job_publishes_requests_by_an_account_of_its_own(terraform: Terraform):
    """The template's parameters are the files and the request topic; the account is none that others use."""
    before = datetime.now(UTC) + timedelta(hours=1)
    plan = terraform.plan(project_id="my-project", requests_from_dataflow=_dataflow(before))
    (job,) = [item for item in plan["resource_changes"] if item["type"] == "google_dataflow_job"]
    assert job["change"]["after"]["parameters"]["inputFilePattern"] == "gs://f/*.jsonl"
    assert job["change"]["after_unknown"]["parameters"] == {"outputTopic": True}, "the topic's id is known later"
    (wired,) = [
        item["expressions"]
        for item in plan["configuration"]["root_module"]["resources"]
        if item["type"] == "google_dataflow_job"
    ]
    assert "google_pubsub_topic.requests" in wired["parameters"]["references"]
    assert "google_service_account.dataflow" in wired["service_account_email"]["references"]


@pytest.mark.parametrize(
    ("hours", "word"),
    [(1, None), (-1, "would be published again"), (25, "within the next 24 hours")],
    ids=["soon", "past", "later-than-a-day"],
)
def test_a_dataflow_job_is_not_started_again_by_a_later_plan(terraform: Terraform, hours: float, word: str | None):
    """The provider forgets a job that has ended, so a plan with the option is refused once its time is over."""
    before = datetime.now(UTC) + timedelta(hours=hours)
    given = ["-var=project_id=my-project", f"-var=requests_from_dataflow={_dataflow(before)}"]
    code, text = terraform("plan", "-no-color", "-input=false", *given)
    assert (code == 0) is (word is None), text
    assert word is None or word in " ".join(text.split()).replace("│ ", "")


def test_a_running_dataflow_job_is_not_cancelled(terraform: Terraform):
    """A plan without the option fails while the job runs: cancelling would leave it open which lines were published."""
    empty = dict.fromkeys(("labels", "max_workers", "on_delete", "parameters", "service_account_email", "subnetwork"))
    job = {"project": "my-project", "name": "inference-requests", "region": "europe-west1", "id": "job"}
    job |= {"template_gcs_path": "gs://t", "temp_gcs_location": "gs://x", **empty}
    state = {
        "version": 4,
        "terraform_version": "1.9.0",
        "serial": 1,
        "lineage": "test",
        "outputs": {},
        "resources": [
            {
                "mode": "managed",
                "type": "google_dataflow_job",
                "name": "requests",
                "provider": 'provider["registry.terraform.io/hashicorp/google"]',
                "instances": [{"index_key": 0, "schema_version": 0, "attributes": job}],
            }
        ],
    }
    (terraform.folder / "terraform.tfstate").write_text(json.dumps(state))
    code, text = terraform("plan", "-no-color", "-input=false", "-var=project_id=my-project")
    assert code == 1
    assert "google_dataflow_job.requests[0]" in text
    assert "prevent_destroy" in text


def test_the_role_in_aws_is_valid_and_as_promised(role_in_aws: Terraform):
    """References and arguments fit, and its own tests pass: who may take it, what it may do."""
    code, text = role_in_aws("validate", "-no-color")
    assert code == 0, text
    code, text = role_in_aws("test", "-no-color")
    assert code == 0, text
    assert "4 passed, 0 failed" in text


def test_the_pods_token_is_the_one_that_aws_takes(role_in_aws: Terraform):
    """The token's audience and the service account in the manifests are those of the role's trust."""
    provider = "arn:aws:iam::123456789012:oidc-provider/x"
    given = {"region": "eu-west-1", "endpoints": '["e"]', "gke_location": "l", "gke_cluster": "c"}
    given |= {"gke_project_id": "p", "identity_provider_arn": provider}
    changes = role_in_aws.plan(**given)["resource_changes"]
    role = next(item["change"]["after"] for item in changes if item["type"] == "aws_iam_role")
    (statement,) = json.loads(role["assume_role_policy"])["Statement"]
    trusted = {key.rpartition(":")[2]: value for key, value in statement["Condition"]["StringEquals"].items()}
    component = yaml.safe_load((KUSTOMIZE / "components" / "sagemaker" / "deployment.yaml").read_text())
    pod = component["spec"]["template"]["spec"]
    (source,) = pod["volumes"][0]["projected"]["sources"]
    token = source["serviceAccountToken"]
    space = yaml.safe_load((KUSTOMIZE / "overlays" / "gke" / "kustomization.yaml").read_text())["namespace"]
    account = yaml.safe_load((KUSTOMIZE / "base" / "serviceaccount.yaml").read_text())["metadata"]["name"]
    assert trusted == {"aud": token["audience"], "sub": f"system:serviceaccount:{space}:{account}"}
    (container,) = pod["containers"]
    environ = {item["name"]: item["value"] for item in container["env"]}
    mounted = container["volumeMounts"][0]["mountPath"]
    assert environ["AWS_WEB_IDENTITY_TOKEN_FILE"] == f"{mounted}/{token['path']}"
