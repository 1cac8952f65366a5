terraform {
  # 1.9: a validation may look at other variables.
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source = "hashicorp/aws"
      # 5.81: an identity provider needs no thumbprints; the upper bound keeps a major release from changing a plan.
      version = ">= 5.81, < 7.0"
    }
  }
}

provider "aws" {
  region = var.region
}
