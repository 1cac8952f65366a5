# Topics and subscriptions.  Requests go in, answers come out, and what neither the worker nor Pub/Sub could place is
# kept for a person to look at.

data "google_project" "this" {
  project_id = var.project_id
}

locals {
  day_seconds = 86400
  labels      = { app = "inference-worker" }

  # Name to filter.  The second sort is for those who want isolation by the broker: each gets its part of the requests
  # (pubsub.subscriptions of the worker).
  requests_worker = "${var.prefix}-requests-worker"
  filtered        = { for key, _ in var.filtered_subscriptions : key => "${var.prefix}-requests-${key}-worker" }
  request_subscriptions = merge(
    { (local.requests_worker) = var.request_filter },
    { for key, name in local.filtered : name => var.filtered_subscriptions[key] },
  )

  # The lines of batches have it as the attribute run_id.
  batch_filter = "hasPrefix(attributes.run_id, \"batch_\")"
}

resource "google_pubsub_topic" "requests" {
  project = var.project_id
  name    = "${var.prefix}-requests"
  labels  = local.labels

  dynamic "ingestion_data_source_settings" {
    for_each = var.requests_from_storage == null ? [] : [var.requests_from_storage]
    content {
      cloud_storage {
        bucket                     = ingestion_data_source_settings.value.bucket
        match_glob                 = ingestion_data_source_settings.value.glob
        minimum_object_create_time = ingestion_data_source_settings.value.since
        text_format {}
      }
      # What could not become a message, a line over 10 MB for example, is only in the platform's log.
      platform_logs_settings {
        severity = "WARNING"
      }
    }
  }
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
  for_each = local.request_subscriptions

  project = var.project_id
  name    = each.key
  topic   = google_pubsub_topic.requests.id
  labels  = local.labels
  filter  = each.value

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

resource "google_pubsub_subscription" "responses" {
  project = var.project_id
  name    = "${var.prefix}-responses-reader"
  topic   = google_pubsub_topic.responses.id
  labels  = local.labels
  filter  = var.response_filter

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

# For `batches serve`: the answers to lines, the lines that Pub/Sub has given up, and the contents of files.
resource "google_pubsub_subscription" "batches" {
  for_each = var.batches == null ? {} : {
    responses    = google_pubsub_topic.responses.id
    dead-letters = google_pubsub_topic.dead_letters.id
  }

  project = var.project_id
  name    = "${var.prefix}-${each.key}-batches"
  topic   = each.value
  labels  = local.labels
  filter  = local.batch_filter

  ack_deadline_seconds       = 60
  message_retention_duration = "${var.retention_days * local.day_seconds}s"

  expiration_policy {
    ttl = ""
  }

  lifecycle {
    # Deleting it deletes every answer that is not stored.
    prevent_destroy = true
  }
}

resource "google_storage_bucket" "batches" {
  count = var.batches == null ? 0 : 1

  project  = var.project_id
  name     = var.batches.bucket
  location = var.batches.location
  labels   = local.labels

  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  # Parts of uploads that were cut.  Everything else is deleted by `batches serve` when its time is over.
  lifecycle_rule {
    condition {
      age = 1
    }
    action {
      type = "AbortIncompleteMultipartUpload"
    }
  }

  lifecycle {
    prevent_destroy = true
  }
}

# Every worker hears what is said on it, by a subscription of its own that it makes and removes.
resource "google_pubsub_topic" "control" {
  count = var.control == null ? 0 : 1

  project = var.project_id
  name    = "${var.prefix}-control"
  labels  = local.labels

  # pubsub.control_remember_s of the worker: one that starts later hears what was said before.
  message_retention_duration = "${local.day_seconds}s"
}
