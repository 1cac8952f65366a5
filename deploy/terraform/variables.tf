variable "project_id" {
  description = "Project of the topics, the subscriptions and the cluster's workload identity pool."
  type        = string
}

variable "prefix" {
  description = "Begins the name of every topic and subscription; one prefix for each installation in a project."
  type        = string
  default     = "inference"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,60}$", var.prefix)) && !startswith(var.prefix, "goog")
    error_message = "prefix: 2 to 61 characters, small letters, digits and hyphens, beginning with a letter, not with goog."
  }
}

variable "namespace" {
  description = "Kubernetes namespace of the worker, as in deploy/kustomize/overlays/gke."
  type        = string
  default     = "inference"
}

variable "service_account" {
  description = "Kubernetes service account of the worker."
  type        = string
  default     = "inference-worker"
}

variable "workload_identity_project_id" {
  description = "Project of the GKE cluster where that is another one; null: project_id."
  type        = string
  default     = null
}

variable "keda_operator" {
  description = "Namespace and service account of KEDA's operator, which reads the metrics that scale; null: no KEDA."
  type = object({
    namespace       = string
    service_account = string
  })
  default = {
    namespace       = "keda"
    service_account = "keda-operator"
  }
}

variable "producers" {
  description = "IAM members that publish requests, for example group:team@example.com."
  type        = set(string)
  default     = []
}

variable "consumers" {
  description = "IAM members that read answers."
  type        = set(string)
  default     = []
}

variable "ack_deadline_seconds" {
  description = "Lease of one delivery before it is extended to a minute. Also what a killed pod's messages wait before they go elsewhere."
  type        = number
  default     = 20

  validation {
    condition     = var.ack_deadline_seconds >= 10 && var.ack_deadline_seconds <= 600
    error_message = "ack_deadline_seconds: Pub/Sub takes 10 to 600."
  }
}

variable "minimum_backoff_seconds" {
  description = "Wait before the first redelivery of a nacked message; doubles with every further nack."
  type        = number
  default     = 10

  validation {
    condition     = var.minimum_backoff_seconds >= 1 && var.minimum_backoff_seconds <= var.maximum_backoff_seconds
    error_message = "minimum_backoff_seconds: at least 1, so that a failing message cannot spin, and not above the maximum."
  }
}

variable "maximum_backoff_seconds" {
  description = "Longest wait between redeliveries."
  type        = number
  default     = 600

  validation {
    condition     = var.maximum_backoff_seconds <= 600
    error_message = "maximum_backoff_seconds: Pub/Sub takes up to 600."
  }
}

variable "max_delivery_attempts" {
  description = <<-EOT
    Deliveries before Pub/Sub moves a message to the dead-letter topic. The worker answers on the last one, so this is
    the bound of retries; evictions, Spot reclaims and shutdowns during an outage each cost one.
  EOT
  type        = number
  default     = 20

  validation {
    condition     = var.max_delivery_attempts >= 10 && var.max_delivery_attempts <= 100
    error_message = "max_delivery_attempts: 10 to 100. Pub/Sub takes 5, but five evictions must not bury a good message."
  }
}

variable "retention_days" {
  description = "How long an unanswered request and an unread answer are kept; Pub/Sub takes up to 31 days."
  type        = number
  default     = 7

  validation {
    condition     = var.retention_days >= 1 && var.retention_days <= 31
    error_message = "retention_days: 1 to 31."
  }
}

variable "request_filter" {
  description = <<-EOT
    Which requests the worker's subscription gets, in Pub/Sub's filter language; empty: all. With filtered_subscriptions
    it is what they leave, for example NOT attributes:model. A change replaces the subscription.
  EOT
  type        = string
  default     = ""
}

variable "filtered_subscriptions" {
  description = <<-EOT
    Further subscriptions to the request topic by name, each with its filter: { llama = "attributes.model = \"llama\"" }
    makes PREFIX-requests-llama-worker. A request that no filter takes is gone. A change replaces the subscription.
  EOT
  type        = map(string)
  default     = {}

  validation {
    condition = alltrue([
      for name, filter in var.filtered_subscriptions : can(regex("^[a-z0-9-]{1,40}$", name)) && filter != ""
    ])
    error_message = "filtered_subscriptions: names of small letters, digits and hyphens, and a filter for each."
  }
}

variable "response_filter" {
  description = <<-EOT
    Which answers the consumers' subscription gets, in Pub/Sub's filter language; empty: all. With batches it is usually
    NOT hasPrefix(attributes.run_id, "batch_"), so that their answers do not pile up there. A change replaces the
    subscription.
  EOT
  type        = string
  default     = ""
}

variable "batches" {
  description = <<-EOT
    For the Files and Batches API: the name of a new bucket for contents of files, its location, and the Kubernetes
    service account of `batches serve`; null: none of it is made.
  EOT
  type = object({
    bucket          = string
    location        = string
    service_account = optional(string, "inference-worker-batches")
  })
  default = null
}

variable "control" {
  description = <<-EOT
    For cancelling requests: IAM members that may cancel; null: no control topic is made. Gives the worker the right to
    make, pull from and delete subscriptions in the project.
  EOT
  type = object({
    cancellers = optional(set(string), [])
  })
  default = null
}
