"""
A stand-in for Terraform's google and aws providers, so that `deploy/terraform` can be validated, planned and tested
offline.

Run by Terraform as a plugin, in an interpreter that has the package `tf`; `test_terraform.py` writes the executable.
It declares the types and arguments that the configuration uses, so a bad reference or a misspelt argument fails, and
the plan shows the wiring.  What it does not prove are Google's and AWS's own schemas.

The arguments follow https://registry.terraform.io/providers/hashicorp/google/latest/docs/resources/pubsub_subscription
and its neighbours.
"""

import sys
import zlib
from pathlib import Path

from tf.blocks import SetNestedBlock
from tf.iface import DataSource, Provider, Resource
from tf.runner import run_provider
from tf.schema import Attribute, Block, Schema
from tf.types import Bool, List, Map, Number, Set, String


def required(name, kind=None):
    return Attribute(name, kind or String(), required=True)


def optional(name, kind=None):
    return Attribute(name, kind or String(), optional=True)


def computed(name):
    return Attribute(name, String(), computed=True)


def block(name, *parts):
    # A list of at most one upstream; the package has sets only, and `one()` reads both.
    attributes = [part for part in parts if isinstance(part, Attribute)]
    return SetNestedBlock(
        name, Block(attributes=attributes, block_types=[part for part in parts if part not in attributes])
    )


SUBSCRIPTION = Schema(
    attributes=[
        required("name"),
        required("topic"),
        required("project"),
        optional("labels", Map(String())),
        optional("ack_deadline_seconds", Number()),
        optional("message_retention_duration"),
        optional("filter"),
        computed("id"),
    ],
    block_types=[
        block("expiration_policy", required("ttl")),
        block("retry_policy", optional("minimum_backoff"), optional("maximum_backoff")),
        block("dead_letter_policy", optional("dead_letter_topic"), optional("max_delivery_attempts", Number())),
        block("bigquery_config", required("table"), optional("write_metadata", Bool())),
        block(
            "cloud_storage_config",
            required("bucket"),
            optional("filename_prefix"),
            optional("filename_suffix"),
            optional("max_bytes", Number()),
            optional("max_duration"),
            block("avro_config", optional("write_metadata", Bool())),
        ),
    ],
)
TOPIC = Schema(
    attributes=[
        required("name"),
        required("project"),
        optional("labels", Map(String())),
        optional("message_retention_duration"),
        computed("id"),
    ],
    block_types=[
        block(
            "ingestion_data_source_settings",
            block(
                "cloud_storage",
                required("bucket"),
                optional("match_glob"),
                optional("minimum_object_create_time"),
                block("text_format", optional("delimiter")),
            ),
            block("platform_logs_settings", optional("severity")),
        ),
    ],
)
TABLE = Schema(
    attributes=[
        required("project"),
        required("dataset_id"),
        required("table_id"),
        optional("labels", Map(String())),
        optional("deletion_protection", Bool()),
        optional("schema"),
        computed("id"),
    ],
    block_types=[block("time_partitioning", required("type"), optional("field"))],
)
ACCOUNT_OF_SERVICE = Schema(
    attributes=[
        required("project"),
        required("account_id"),
        optional("display_name"),
        computed("email"),
        computed("id"),
    ]
)
RESERVATION = Schema(
    attributes=[
        required("project"),
        required("name"),
        required("location"),
        required("slot_capacity", Number()),
        optional("edition"),
        computed("id"),
    ]
)
ASSIGNMENT = Schema(
    attributes=[
        required("project"),
        required("location"),
        required("reservation"),
        required("assignee"),
        required("job_type"),
        computed("id"),
    ]
)
BUCKET = Schema(
    attributes=[
        required("name"),
        required("location"),
        required("project"),
        optional("labels", Map(String())),
        optional("uniform_bucket_level_access", Bool()),
        optional("public_access_prevention"),
        computed("id"),
    ],
    block_types=[
        SetNestedBlock(
            "lifecycle_rule",
            Block(block_types=[block("condition", optional("age", Number())), block("action", required("type"))]),
        ),
    ],
)
JOB = Schema(
    attributes=[
        required("project"),
        required("name"),
        required("region"),
        required("template_gcs_path"),
        required("temp_gcs_location"),
        optional("service_account_email"),
        optional("max_workers", Number()),
        optional("subnetwork"),
        optional("labels", Map(String())),
        optional("parameters", Map(String())),
        optional("on_delete"),
        computed("id"),
    ]
)
ROLE = Schema(
    attributes=[
        required("role_id"),
        required("project"),
        required("title"),
        required("permissions", Set(String())),
        computed("id"),
    ]
)


def member_of(*keys):
    return Schema(attributes=[*map(required, keys), required("role"), required("member"), computed("id")])


def resource_type(name, schema):
    """Return the class of one resource type; nothing is ever really created."""

    class Declared(Resource):
        def __init__(self, provider):
            self.provider = provider

        @classmethod
        def get_name(cls):
            return name

        @classmethod
        def get_schema(cls):
            return schema

        def create(self, ctx, planned):
            raise RuntimeError("a plan must change nothing")

        def read(self, ctx, current):
            return current

        def update(self, ctx, current, planned):
            raise RuntimeError("a plan must change nothing")

        def delete(self, ctx, current):
            raise RuntimeError("a plan must change nothing")

    return Declared


class Project(DataSource):
    """`google_project`: a number that differs from project to project."""

    def __init__(self, provider):
        self.provider = provider

    @classmethod
    def get_name(cls):
        return "project"

    @classmethod
    def get_schema(cls):
        return Schema(attributes=[required("project_id"), computed("number")])

    def read(self, ctx, config):
        return {**config, "number": str(10**11 + zlib.crc32(config["project_id"].encode()))}


class Google(Provider):
    def get_model_prefix(self):
        return "google_"

    def get_provider_schema(self, diags):
        return Schema(attributes=[optional("project")])

    def full_name(self):
        return "registry.terraform.io/hashicorp/google"

    def validate_config(self, diags, config):
        """Nothing to refuse."""

    def configure_provider(self, diags, config):
        """Nothing to connect to."""

    def get_data_sources(self):
        return [Project]

    def get_resources(self):
        return [
            resource_type("pubsub_topic", TOPIC),
            resource_type("pubsub_subscription", SUBSCRIPTION),
            resource_type("pubsub_topic_iam_member", member_of("project", "topic")),
            resource_type("pubsub_subscription_iam_member", member_of("project", "subscription")),
            resource_type("project_iam_member", member_of("project")),
            resource_type("bigquery_table", TABLE),
            resource_type("bigquery_table_iam_member", member_of("project", "dataset_id", "table_id")),
            resource_type("bigquery_reservation", RESERVATION),
            resource_type("bigquery_reservation_assignment", ASSIGNMENT),
            resource_type("service_account", ACCOUNT_OF_SERVICE),
            resource_type("dataflow_job", JOB),
            resource_type("project_iam_custom_role", ROLE),
            resource_type("storage_bucket", BUCKET),
            resource_type("storage_bucket_iam_member", member_of("bucket")),
        ]


ACCOUNT = "123456789012"


def fact(name, **values):
    """Return the class of a data source that takes nothing."""

    class Known(DataSource):
        def __init__(self, provider):
            self.provider = provider

        @classmethod
        def get_name(cls):
            return name

        @classmethod
        def get_schema(cls):
            return Schema(attributes=[computed(key) for key in values])

        def read(self, ctx, config):
            return dict(values)

    return Known


class Aws(Provider):
    def get_model_prefix(self):
        return "aws_"

    def get_provider_schema(self, diags):
        return Schema(attributes=[optional("region")])

    def full_name(self):
        return "registry.terraform.io/hashicorp/aws"

    def validate_config(self, diags, config):
        """Nothing to refuse."""

    def configure_provider(self, diags, config):
        """Nothing to connect to."""

    def get_data_sources(self):
        return [fact("caller_identity", account_id=ACCOUNT), fact("partition", partition="aws")]

    def get_resources(self):
        provider = [required("url"), required("client_id_list", List(String())), computed("arn"), computed("id")]
        role = [
            required("name"),
            required("assume_role_policy"),
            optional("description"),
            optional("max_session_duration", Number()),
            computed("arn"),
            computed("id"),
        ]
        policy = [required("name"), required("role"), required("policy"), computed("id")]
        return [
            resource_type("iam_openid_connect_provider", Schema(attributes=provider)),
            resource_type("iam_role", Schema(attributes=role)),
            resource_type("iam_role_policy", Schema(attributes=policy)),
        ]


if __name__ == "__main__":
    # Terraform starts the executable by the name of the provider.
    run_provider(Aws() if Path(sys.argv[0]).name.endswith("-aws") else Google(), sys.argv)
