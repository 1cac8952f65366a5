# The first three go into deploy/kustomize/overlays/gke/values.yaml.

output "project_id" {
  description = "spec.projectId"
  value       = var.project_id
}

output "request_subscription" {
  description = "spec.requestSubscription"
  value       = google_pubsub_subscription.requests[local.requests_worker].name
}

output "filtered_subscriptions" {
  description = "Names for pubsub.subscriptions of the worker, by name of the filter."
  value       = { for key, name in local.filtered : key => google_pubsub_subscription.requests[name].name }
}

output "response_topic" {
  description = "spec.responseTopic"
  value       = google_pubsub_topic.responses.name
}

output "request_topic" {
  description = "Where producers publish."
  value       = google_pubsub_topic.requests.id
}

output "response_subscription" {
  description = "Where consumers read."
  value       = google_pubsub_subscription.responses.id
}

output "dead_letter_subscription" {
  description = "Where a person looks."
  value       = google_pubsub_subscription.dead_letters.id
}

output "worker_principal" {
  description = "The IAM member that the worker's pods are."
  value       = local.worker
}

output "batches" {
  description = "spec.batches; null without batches."
  value = var.batches == null ? null : {
    requestTopic           = google_pubsub_topic.requests.name
    responseSubscription   = google_pubsub_subscription.batches["responses"].name
    deadLetterSubscription = google_pubsub_subscription.batches["dead-letters"].name
    files                  = "gs://${google_storage_bucket.batches[0].name}/files"
  }
}

output "batches_principal" {
  description = "The IAM member that the pods of `batches serve` are; null without batches."
  value       = local.batches
}

output "control_topic" {
  description = "pubsub.control_topic of the worker; null without control."
  value       = one(google_pubsub_topic.control[*].name)
}
