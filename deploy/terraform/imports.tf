# Where requests come from beside publishers: objects in Cloud Storage, read by Pub/Sub itself, and rows of BigQuery.
# Off by default.  What each costs and loses: docs/how-to/a-billion-lines.md.

variable "requests_from_storage" {
  description = <<-EOT
    Makes the request topic an import topic: { bucket = "my-requests" }. Each line of each object becomes a message, a
    request or a line of an OpenAI batch file. since: RFC 3339; older objects are left alone.
  EOT
  type = object({
    bucket = string
    glob   = optional(string, "**.jsonl")
    since  = optional(string)
  })
  default = null
}

variable "requests_from_bigquery" {
  description = <<-EOT
    What a continuous query needs that publishes rows as requests: { dataset = "inference", table = "requests",
    location = "europe-west1" }, both existing. The query itself is the output continuous_query: Terraform starts no jobs.
    slots is billed for as long as the reservation exists.
  EOT
  type = object({
    dataset  = string
    table    = string
    location = string
    slots    = optional(number, 50)
  })
  default = null
}

# Cloud Storage: the topic's own setting (main.tf), and Pub/Sub's right to read the bucket and to publish.

resource "google_storage_bucket_iam_member" "agent_reads_objects" {
  for_each = var.requests_from_storage == null ? toset([]) : toset(["roles/storage.objectViewer", "roles/storage.legacyBucketReader"])

  bucket = var.requests_from_storage.bucket
  role   = each.key
  member = local.agent
}

resource "google_pubsub_topic_iam_member" "agent_imports" {
  count = var.requests_from_storage == null ? 0 : 1

  project = var.project_id
  topic   = google_pubsub_topic.requests.name
  role    = "roles/pubsub.publisher"
  member  = local.agent
}

# BigQuery: an account for the query, its rights, and slots of the Enterprise edition, without which none runs.

resource "google_service_account" "query" {
  count = var.requests_from_bigquery == null ? 0 : 1

  project      = var.project_id
  account_id   = "${var.prefix}-query"
  display_name = "Publishes rows of BigQuery as requests"
}

locals {
  query = "serviceAccount:${one(google_service_account.query[*].email) == null ? "" : one(google_service_account.query[*].email)}"
}

resource "google_bigquery_table_iam_member" "query_reads_rows" {
  count = var.requests_from_bigquery == null ? 0 : 1

  project    = var.project_id
  dataset_id = var.requests_from_bigquery.dataset
  table_id   = var.requests_from_bigquery.table
  role       = "roles/bigquery.dataViewer"
  member     = local.query
}

resource "google_pubsub_topic_iam_member" "query_publishes" {
  for_each = var.requests_from_bigquery == null ? toset([]) : toset(["roles/pubsub.publisher", "roles/pubsub.viewer"])

  project = var.project_id
  topic   = google_pubsub_topic.requests.name
  role    = each.key
  member  = local.query
}

resource "google_bigquery_reservation" "query" {
  count = var.requests_from_bigquery == null ? 0 : 1

  project       = var.project_id
  name          = "${var.prefix}-continuous"
  location      = var.requests_from_bigquery.location
  edition       = "ENTERPRISE"
  slot_capacity = var.requests_from_bigquery.slots
}

resource "google_bigquery_reservation_assignment" "query" {
  count = var.requests_from_bigquery == null ? 0 : 1

  project     = var.project_id
  location    = var.requests_from_bigquery.location
  reservation = google_bigquery_reservation.query[0].id
  assignee    = "projects/${var.project_id}"
  job_type    = "CONTINUOUS"
}

output "continuous_query" {
  description = "For bq query --continuous, with the account of continuous_query_account; the table has path, metadata, body."
  value = var.requests_from_bigquery == null ? null : join("\n", [
    "EXPORT DATA OPTIONS (format = 'CLOUD_PUBSUB',",
    "  uri = 'https://pubsub.googleapis.com/projects/${var.project_id}/topics/${google_pubsub_topic.requests.name}')",
    "AS (SELECT TO_JSON_STRING(STRUCT(path, metadata, body)) AS message",
    "  FROM APPENDS(TABLE `${var.project_id}.${var.requests_from_bigquery.dataset}.${var.requests_from_bigquery.table}`,",
    "    CURRENT_TIMESTAMP() - INTERVAL 10 MINUTE))",
  ])
}

output "continuous_query_account" {
  description = "The service account that runs the query."
  value       = one(google_service_account.query[*].email)
}
