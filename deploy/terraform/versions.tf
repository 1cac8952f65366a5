terraform {
  # 1.9: a validation may look at other variables.
  required_version = ">= 1.9"

  required_providers {
    google = {
      source = "hashicorp/google"
      # 6: every argument below exists; the upper bound keeps a major release from changing a plan by itself.
      version = ">= 6.0, < 8.0"
    }
  }
}

provider "google" {
  project = var.project_id
}
