# Where answers go beside the response subscription: a BigQuery table, objects in Cloud Storage, written by Pub/Sub itself.
# Off by default.  What each costs and loses: docs/how-to/a-billion-lines.md.

variable "responses_to_bigquery" {
  description = <<-EOT
    Writes every answer into a table: { dataset = "inference" }, an existing dataset of this project. The table is made,
    with the answer as text in the column data and its attributes in attributes.
  EOT
  type = object({
    dataset = string
    table   = optional(string, "responses")
  })
  default = null
}

variable "responses_to_storage" {
  description = <<-EOT
    Writes every answer into objects of an existing bucket: { bucket = "my-answers" }. format: avro has attributes and
    message ids too; text has the answers alone, one after the other.
  EOT
  type = object({
    bucket      = string
    prefix      = optional(string, "responses/")
    format      = optional(string, "avro")
    max_bytes   = optional(number, 1000000000)
    max_seconds = optional(number, 300)
  })
  default = null

  validation {
    condition     = var.responses_to_storage == null || contains(["avro", "text"], try(var.responses_to_storage.format, ""))
    error_message = "responses_to_storage.format: avro or text."
  }

  validation {
    condition = var.responses_to_storage == null || (
      try(var.responses_to_storage.max_seconds, 0) >= 60 && try(var.responses_to_storage.max_seconds, 0) <= 600
    )
    error_message = "responses_to_storage.max_seconds: Pub/Sub takes 60 to 600."
  }
}

locals {
  exports = toset(concat(
    var.responses_to_bigquery == null ? [] : ["bigquery"],
    var.responses_to_storage == null ? [] : ["storage"],
  ))
}

# Answers that cannot be written, for example because a row is too large, must neither block the others nor be lost.
# A topic of their own: what is dead-lettered here is an answer, and must never be replayed as a request.

resource "google_pubsub_topic" "unwritten" {
  count = length(local.exports) == 0 ? 0 : 1

  project = var.project_id
  name    = "${var.prefix}-responses-unwritten"
  labels  = local.labels
}

resource "google_pubsub_subscription" "unwritten" {
  count = length(local.exports) == 0 ? 0 : 1

  project = var.project_id
  name    = "${var.prefix}-responses-unwritten-hold"
  topic   = google_pubsub_topic.unwritten[0].id
  labels  = local.labels

  ack_deadline_seconds       = 60
  message_retention_duration = "${31 * local.day_seconds}s"

  expiration_policy {
    ttl = ""
  }

  lifecycle {
    prevent_destroy = true
  }
}

resource "google_pubsub_topic_iam_member" "agent_buries_unwritten" {
  count = length(local.exports) == 0 ? 0 : 1

  project = var.project_id
  topic   = google_pubsub_topic.unwritten[0].name
  role    = "roles/pubsub.publisher"
  member  = local.agent
}

resource "google_pubsub_subscription_iam_member" "agent_takes_unwritten" {
  for_each = local.exports

  project      = var.project_id
  subscription = each.key == "bigquery" ? google_pubsub_subscription.bigquery[0].name : google_pubsub_subscription.storage[0].name
  role         = "roles/pubsub.subscriber"
  member       = local.agent
}

# BigQuery

resource "google_bigquery_table" "responses" {
  count = var.responses_to_bigquery == null ? 0 : 1

  project             = var.project_id
  dataset_id          = var.responses_to_bigquery.dataset
  table_id            = var.responses_to_bigquery.table
  labels              = local.labels
  deletion_protection = true

  # What Pub/Sub writes with write_metadata.  data is text and not JSON: BigQuery's JSON refuses numbers that it would
  # have to round, and metadata may have such.  https://cloud.google.com/pubsub/docs/bigquery
  schema = jsonencode([
    { name = "subscription_name", type = "STRING" },
    { name = "message_id", type = "STRING" },
    { name = "publish_time", type = "TIMESTAMP" },
    { name = "data", type = "STRING" },
    { name = "attributes", type = "JSON" },
  ])

  time_partitioning {
    type  = "DAY"
    field = "publish_time"
  }
}

resource "google_bigquery_table_iam_member" "agent_writes_rows" {
  for_each = var.responses_to_bigquery == null ? toset([]) : toset(["roles/bigquery.dataEditor", "roles/bigquery.metadataViewer"])

  project    = var.project_id
  dataset_id = google_bigquery_table.responses[0].dataset_id
  table_id   = google_bigquery_table.responses[0].table_id
  role       = each.key
  member     = local.agent
}

resource "google_pubsub_subscription" "bigquery" {
  count = var.responses_to_bigquery == null ? 0 : 1

  project = var.project_id
  name    = "${var.prefix}-responses-bigquery"
  topic   = google_pubsub_topic.responses.id
  labels  = local.labels

  message_retention_duration = "${var.retention_days * local.day_seconds}s"

  expiration_policy {
    ttl = ""
  }

  bigquery_config {
    table          = "${var.project_id}.${google_bigquery_table.responses[0].dataset_id}.${google_bigquery_table.responses[0].table_id}"
    write_metadata = true
  }

  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.unwritten[0].id
    max_delivery_attempts = var.max_delivery_attempts
  }

  lifecycle {
    prevent_destroy = true
  }

  depends_on = [google_bigquery_table_iam_member.agent_writes_rows]
}

# Cloud Storage

resource "google_storage_bucket_iam_member" "agent_writes_objects" {
  for_each = var.responses_to_storage == null ? toset([]) : toset(["roles/storage.objectCreator", "roles/storage.legacyBucketReader"])

  bucket = var.responses_to_storage.bucket
  role   = each.key
  member = local.agent
}

resource "google_pubsub_subscription" "storage" {
  count = var.responses_to_storage == null ? 0 : 1

  project = var.project_id
  name    = "${var.prefix}-responses-storage"
  topic   = google_pubsub_topic.responses.id
  labels  = local.labels

  # Not less than Pub/Sub may wait until an object is full.
  ack_deadline_seconds       = 600
  message_retention_duration = "${var.retention_days * local.day_seconds}s"

  expiration_policy {
    ttl = ""
  }

  cloud_storage_config {
    bucket          = var.responses_to_storage.bucket
    filename_prefix = var.responses_to_storage.prefix
    filename_suffix = var.responses_to_storage.format == "avro" ? ".avro" : ".jsonl"
    max_bytes       = var.responses_to_storage.max_bytes
    max_duration    = "${var.responses_to_storage.max_seconds}s"

    dynamic "avro_config" {
      for_each = var.responses_to_storage.format == "avro" ? [1] : []
      content {
        write_metadata = true
      }
    }
  }

  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.unwritten[0].id
    max_delivery_attempts = var.max_delivery_attempts
  }

  lifecycle {
    prevent_destroy = true
  }

  depends_on = [google_storage_bucket_iam_member.agent_writes_objects]
}
