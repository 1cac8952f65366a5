# Who may do what: every role on one topic or one subscription. Only KEDA's reading of metrics, and the options control and
# requests_from_dataflow, need one on the project.

locals {
  pool_project = coalesce(var.workload_identity_project_id, var.project_id)

  # Kubernetes service accounts named directly: no Google service account, no key, no annotation.
  # https://cloud.google.com/kubernetes-engine/docs/how-to/workload-identity
  pool   = "principal://iam.googleapis.com/projects/${data.google_project.cluster.number}/locations/global/workloadIdentityPools/${local.pool_project}.svc.id.goog"
  worker = "${local.pool}/subject/ns/${var.namespace}/sa/${var.service_account}"
  batches = (
    var.batches == null ? null : "${local.pool}/subject/ns/${var.namespace}/sa/${var.batches.service_account}"
  )

  # Pub/Sub itself, which moves messages to the dead-letter topic.
  agent = "serviceAccount:service-${data.google_project.this.number}@gcp-sa-pubsub.iam.gserviceaccount.com"
}

data "google_project" "cluster" {
  project_id = local.pool_project
}

locals {
  pulled = merge(
    { requests = google_pubsub_subscription.requests[local.requests_worker].name },
    { for key, name in local.filtered : "filtered-${key}" => google_pubsub_subscription.requests[name].name },
  )
}

# The worker: pull and settle, read the subscription's own policy, publish answers.

resource "google_pubsub_subscription_iam_member" "worker_pulls" {
  for_each = local.pulled

  project      = var.project_id
  subscription = each.value
  role         = "roles/pubsub.subscriber"
  member       = local.worker
}

resource "google_pubsub_subscription_iam_member" "worker_reads_policy" {
  for_each = local.pulled

  project      = var.project_id
  subscription = each.value
  role         = "roles/pubsub.viewer"
  member       = local.worker
}

resource "google_pubsub_topic_iam_member" "worker_answers" {
  project = var.project_id
  topic   = google_pubsub_topic.responses.name
  role    = "roles/pubsub.publisher"
  member  = local.worker
}

# Pub/Sub's agent needs both, or dead-lettering silently does not happen.

resource "google_pubsub_topic_iam_member" "agent_buries" {
  project = var.project_id
  topic   = google_pubsub_topic.dead_letters.name
  role    = "roles/pubsub.publisher"
  member  = local.agent
}

resource "google_pubsub_subscription_iam_member" "agent_takes" {
  for_each = local.pulled

  project      = var.project_id
  subscription = each.value
  role         = "roles/pubsub.subscriber"
  member       = local.agent
}

# KEDA's operator asks Cloud Monitoring; metrics have no finer resource than the project.

resource "google_project_iam_member" "keda_reads_metrics" {
  count = var.keda_operator == null ? 0 : 1

  project = var.project_id
  role    = "roles/monitoring.viewer"
  member  = "${local.pool}/subject/ns/${var.keda_operator.namespace}/sa/${var.keda_operator.service_account}"
}

# `batches serve`: publish lines, read their answers and those that Pub/Sub has given up, keep contents of files.

resource "google_pubsub_topic_iam_member" "batches_publishes" {
  count = var.batches == null ? 0 : 1

  project = var.project_id
  topic   = google_pubsub_topic.requests.name
  role    = "roles/pubsub.publisher"
  member  = local.batches
}

# Tells the workers of cancelled batches.
resource "google_pubsub_topic_iam_member" "batches_cancels" {
  count = var.batches == null || var.control == null ? 0 : 1

  project = var.project_id
  topic   = google_pubsub_topic.control[0].name
  role    = "roles/pubsub.publisher"
  member  = local.batches
}

resource "google_pubsub_subscription_iam_member" "batches_reads" {
  for_each = google_pubsub_subscription.batches

  project      = var.project_id
  subscription = each.value.name
  role         = "roles/pubsub.subscriber"
  member       = local.batches
}

resource "google_storage_bucket_iam_member" "batches_keeps_files" {
  count = var.batches == null ? 0 : 1

  bucket = google_storage_bucket.batches[0].name
  role   = "roles/storage.objectUser"
  member = local.batches
}

# Cancelling: a worker makes and removes a subscription of its own, which no role on one resource covers.

resource "google_project_iam_custom_role" "control" {
  count = var.control == null ? 0 : 1

  project     = var.project_id
  role_id     = "${replace(var.prefix, "-", "_")}_control"
  title       = "Inference worker: its own subscription to the control topic"
  permissions = ["pubsub.subscriptions.consume", "pubsub.subscriptions.create", "pubsub.subscriptions.delete"]
}

resource "google_project_iam_member" "worker_makes_its_subscription" {
  count = var.control == null ? 0 : 1

  project = var.project_id
  role    = "projects/${var.project_id}/roles/${google_project_iam_custom_role.control[0].role_id}"
  member  = local.worker
}

# Has pubsub.topics.attachSubscription.
resource "google_pubsub_topic_iam_member" "worker_attaches" {
  count = var.control == null ? 0 : 1

  project = var.project_id
  topic   = google_pubsub_topic.control[0].name
  role    = "roles/pubsub.subscriber"
  member  = local.worker
}

resource "google_pubsub_topic_iam_member" "canceller" {
  for_each = var.control == null ? toset([]) : var.control.cancellers

  project = var.project_id
  topic   = google_pubsub_topic.control[0].name
  role    = "roles/pubsub.publisher"
  member  = each.value
}

# People and programs on both ends.

resource "google_pubsub_topic_iam_member" "producer" {
  for_each = var.producers

  project = var.project_id
  topic   = google_pubsub_topic.requests.name
  role    = "roles/pubsub.publisher"
  member  = each.value
}

resource "google_pubsub_subscription_iam_member" "consumer" {
  for_each = var.consumers

  project      = var.project_id
  subscription = google_pubsub_subscription.responses.name
  role         = "roles/pubsub.subscriber"
  member       = each.value
}

# What was one member before there could be several subscriptions.

moved {
  from = google_pubsub_subscription_iam_member.worker_pulls
  to   = google_pubsub_subscription_iam_member.worker_pulls["requests"]
}

moved {
  from = google_pubsub_subscription_iam_member.worker_reads_policy
  to   = google_pubsub_subscription_iam_member.worker_reads_policy["requests"]
}

moved {
  from = google_pubsub_subscription_iam_member.agent_takes
  to   = google_pubsub_subscription_iam_member.agent_takes["requests"]
}
