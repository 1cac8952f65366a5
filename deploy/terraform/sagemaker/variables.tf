variable "region" {
  description = "AWS region of the endpoints."
  type        = string
}

variable "endpoints" {
  description = "Names of the SageMaker endpoints that the worker may invoke."
  type        = list(string)

  validation {
    condition     = length(var.endpoints) > 0 && alltrue([for name in var.endpoints : can(regex("^[a-zA-Z0-9](-*[a-zA-Z0-9])*$", name)) && length(name) <= 63])
    error_message = "endpoints: at least one name of letters, digits and hyphens, no pattern."
  }
}

variable "inference_components" {
  description = "Names of the inference components on them that the worker may invoke."
  type        = list(string)
  default     = []
}

variable "gke_project_id" {
  description = "Google Cloud project of the cluster that the worker runs in."
  type        = string
}

variable "gke_location" {
  description = "Region or zone of the cluster."
  type        = string
}

variable "gke_cluster" {
  description = "Name of the cluster."
  type        = string
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

variable "role_name" {
  description = "Name of the role."
  type        = string
  default     = "inference-worker"
}

variable "identity_provider_arn" {
  description = "ARN of the account's identity provider for the cluster where there is one already; null makes it."
  type        = string
  default     = null
}
