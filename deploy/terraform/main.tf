# Topics and subscriptions.  Requests go in, answers come out, and what neither the worker nor Pub/Sub could place is
# kept for a person to look at.

data "google_project" "this" {
  project_id = var.project_id
}

locals {
  day_seconds = 86400
  labels      = { app = "inference-worker" }
}

resource "google_pubsub_topic" "requests" {
  project = var.project_id
  name    = "${var.prefix}-requests"
  labels  = local.labels
}

resource "google_pubsub_topic" "responses" {
  project = var.project_id
  name    = "${var.prefix}-responses"
  labels  = local.labels
}

resource "google_pubsub_topic" "dead_letters" {
  project = var.project_id
  name    = "${var.prefix}-dead-letters"
  labels  = local.labels
}

resource "google_pubsub_subscription" "requests" {
  project = var.project_id
  name    = "${var.prefix}-requests-worker"
  topic   = google_pubsub_topic.requests.id
  labels  = local.labels
  filter  = var.request_filter

  ack_deadline_seconds       = var.ack_deadline_seconds
  message_retention_duration = "${var.retention_days * local.day_seconds}s"

  # Never: the default deletes a subscription after 31 days without a pull, and a worker scaled to zero does not pull.
  expiration_policy {
    ttl = ""
  }

  retry_policy {
    minimum_backoff = "${var.minimum_backoff_seconds}s"
    maximum_backoff = "${var.maximum_backoff_seconds}s"
  }

  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.dead_letters.id
    max_delivery_attempts = var.max_delivery_attempts
  }

  lifecycle {
    # Deleting it deletes every unanswered request.
    prevent_destroy = true
  }
}

# For those who want isolation by the broker: each gets its part of the requests (pubsub.subscriptions of the worker).
resource "google_pubsub_subscription" "filtered" {
  for_each = var.filtered_subscriptions

  project = var.project_id
  name    = "${var.prefix}-requests-${each.key}-worker"
  topic   = google_pubsub_topic.requests.id
  labels  = local.labels
  filter  = each.value

  ack_deadline_seconds       = var.ack_deadline_seconds
  message_retention_duration = "${var.retention_days * local.day_seconds}s"

  expiration_policy {
    ttl = ""
  }

  retry_policy {
    minimum_backoff = "${var.minimum_backoff_seconds}s"
    maximum_backoff = "${var.maximum_backoff_seconds}s"
  }

  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.dead_letters.id
    max_delivery_attempts = var.max_delivery_attempts
  }

  lifecycle {
    prevent_destroy = true
  }
}

resource "google_pubsub_subscription" "responses" {
  project = var.project_id
  name    = "${var.prefix}-responses-reader"
  topic   = google_pubsub_topic.responses.id
  labels  = local.labels

  ack_deadline_seconds       = 60
  message_retention_duration = "${var.retention_days * local.day_seconds}s"

  expiration_policy {
    ttl = ""
  }

  lifecycle {
    # Deleting it deletes every unread answer.
    prevent_destroy = true
  }
}

# A dead-letter topic without a subscription loses what it is given.
resource "google_pubsub_subscription" "dead_letters" {
  project = var.project_id
  name    = "${var.prefix}-dead-letters-hold"
  topic   = google_pubsub_topic.dead_letters.id
  labels  = local.labels

  ack_deadline_seconds = 60
  # The longest Pub/Sub keeps anything: a person has to find the time.
  message_retention_duration = "${31 * local.day_seconds}s"

  expiration_policy {
    ttl = ""
  }

  lifecycle {
    prevent_destroy = true
  }
}
