# Where requests come from beside publishers: objects in Cloud Storage, read by Pub/Sub itself or once by a Dataflow job,
# and rows of BigQuery.
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
    location = "europe-west1" }, both existing. Terraform does not start the query; it is the output continuous_query.
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

variable "requests_from_dataflow" {
  description = <<-EOT
    Starts one Dataflow job that publishes each line of the files once and ends: { files = "gs://my-requests/*.jsonl",
    temp = "gs://my-bucket/dataflow", region = "europe-west1", start_before = "2026-11-30T18:00:00Z" }. Terraform forgets a
    job that has ended, and the next apply with this option would publish every line again. So give it with -var to one
    apply; from start_before (RFC 3339, at most a day ahead) on, a plan with it fails. temp is a folder that the job may
    write to; subnetwork is regions/REGION/subnetworks/NAME, null the network default.
  EOT
  type = object({
    files        = string
    temp         = string
    region       = string
    start_before = string
    max_workers  = optional(number, 10)
    subnetwork   = optional(string)
  })
  default = null

  validation {
    condition = var.requests_from_dataflow == null || alltrue([
      for path in [try(var.requests_from_dataflow.files, ""), try(var.requests_from_dataflow.temp, "")] :
      can(regex("^gs://[^/*?]+/.", path))
    ])
    error_message = "requests_from_dataflow: files and temp are gs://BUCKET/PATH."
  }

  validation {
    condition = var.requests_from_dataflow == null || try(
      timecmp(plantimestamp(), var.requests_from_dataflow.start_before) < 0 &&
      timecmp(var.requests_from_dataflow.start_before, timeadd(plantimestamp(), "24h")) <= 0,
      false
    )
    error_message = "requests_from_dataflow.start_before: a time within the next 24 hours. If the job was started already, leave the option out: with it every line would be published again."
  }

  validation {
    condition     = var.requests_from_dataflow == null || try(var.requests_from_dataflow.max_workers, 0) >= 1
    error_message = "requests_from_dataflow.max_workers: at least 1."
  }

  validation {
    condition = (
      var.requests_from_dataflow == null || var.requests_from_storage == null
      || !startswith(try(var.requests_from_dataflow.files, ""), "gs://${try(var.requests_from_storage.bucket, "")}/")
    )
    error_message = "requests_from_dataflow.files: requests_from_storage publishes the lines of this bucket already."
  }
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

# Dataflow: an account for the job, its rights, and the job.
# https://github.com/GoogleCloudPlatform/DataflowTemplates/blob/main/v1/README_GCS_Text_to_Cloud_PubSub.md

resource "google_service_account" "dataflow" {
  count = var.requests_from_dataflow == null ? 0 : 1

  project      = var.project_id
  account_id   = "${var.prefix}-dataflow"
  display_name = "Publishes lines of files as requests"
}

locals {
  dataflow = "serviceAccount:${one(google_service_account.dataflow[*].email) == null ? "" : one(google_service_account.dataflow[*].email)}"
  dataflow_buckets = var.requests_from_dataflow == null ? {} : {
    for role, path in { objectViewer = var.requests_from_dataflow.files, objectAdmin = var.requests_from_dataflow.temp } :
    role => split("/", path)[2]
  }
}

# What every worker of Dataflow needs; there is no finer resource than the project for it.
resource "google_project_iam_member" "dataflow_works" {
  count = var.requests_from_dataflow == null ? 0 : 1

  project = var.project_id
  role    = "roles/dataflow.worker"
  member  = local.dataflow
}

resource "google_storage_bucket_iam_member" "dataflow_reads_and_keeps" {
  for_each = local.dataflow_buckets

  bucket = each.value
  role   = "roles/storage.${each.key}"
  member = local.dataflow
}

resource "google_pubsub_topic_iam_member" "dataflow_publishes" {
  for_each = var.requests_from_dataflow == null ? toset([]) : toset(["roles/pubsub.publisher", "roles/pubsub.viewer"])

  project = var.project_id
  topic   = google_pubsub_topic.requests.name
  role    = each.key
  member  = local.dataflow
}

resource "google_dataflow_job" "requests" {
  count = var.requests_from_dataflow == null ? 0 : 1

  project = var.project_id
  name    = "${var.prefix}-requests"
  region  = var.requests_from_dataflow.region
  labels  = local.labels

  # A classic template.  The one for streaming (Stream_GCS_Text_to_Cloud_PubSub) never ends; an import topic does the same
  # without a job.  There is no flex template from text files to Pub/Sub.
  template_gcs_path     = "gs://dataflow-templates-${var.requests_from_dataflow.region}/latest/GCS_Text_to_Cloud_PubSub"
  temp_gcs_location     = var.requests_from_dataflow.temp
  service_account_email = google_service_account.dataflow[0].email
  max_workers           = var.requests_from_dataflow.max_workers
  subnetwork            = var.requests_from_dataflow.subnetwork

  parameters = {
    inputFilePattern = var.requests_from_dataflow.files
    outputTopic      = google_pubsub_topic.requests.id
  }

  # A job for a set of files cannot be drained.
  on_delete = "cancel"

  lifecycle {
    # Cancelling a job half-way leaves it open which lines were published.
    prevent_destroy = true
  }

  depends_on = [
    google_project_iam_member.dataflow_works,
    google_storage_bucket_iam_member.dataflow_reads_and_keeps,
    google_pubsub_topic_iam_member.dataflow_publishes,
  ]
}
