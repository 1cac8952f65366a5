# The worker's role in AWS, without any key: AWS trusts the cluster's own tokens, of one service account, for one audience.
#
# GKE signs the tokens of service accounts and publishes its keys at the cluster's issuer, so that AWS can check them
# (https://docs.aws.amazon.com/IAM/latest/UserGuide/id_roles_providers_create_oidc.html).  The pod gets such a token as a
# file (deploy/kustomize/components/sagemaker), and botocore exchanges it at AWS's token service for credentials of an hour.

locals {
  issuer   = "container.googleapis.com/v1/projects/${var.gke_project_id}/locations/${var.gke_location}/clusters/${var.gke_cluster}"
  audience = "sts.amazonaws.com"
  provider = var.identity_provider_arn != null ? var.identity_provider_arn : one(aws_iam_openid_connect_provider.cluster[*].arn)
  account  = data.aws_caller_identity.this.account_id
  arn      = "arn:${data.aws_partition.this.partition}:sagemaker:${var.region}:${local.account}"
}

data "aws_caller_identity" "this" {}

data "aws_partition" "this" {}

resource "aws_iam_openid_connect_provider" "cluster" {
  count = var.identity_provider_arn == null ? 1 : 0

  url            = "https://${local.issuer}"
  client_id_list = [local.audience]
}

resource "aws_iam_role" "worker" {
  name        = var.role_name
  description = "Pub/Sub inference worker on GKE: invokes SageMaker endpoints."
  # A run longer than this renews its credentials; nothing is gained by longer ones.
  max_session_duration = 3600

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRoleWithWebIdentity"
      Principal = { Federated = local.provider }
      # Both, exactly: without `sub` every pod of the cluster could take the role.
      Condition = {
        StringEquals = {
          "${local.issuer}:aud" = local.audience
          "${local.issuer}:sub" = "system:serviceaccount:${var.namespace}:${var.service_account}"
        }
      }
    }]
  })
}

resource "aws_iam_role_policy" "invokes" {
  name = "invokes-endpoints"
  role = aws_iam_role.worker.name

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect = "Allow"
      Action = ["sagemaker:InvokeEndpoint", "sagemaker:InvokeEndpointWithResponseStream"]
      Resource = concat(
        [for name in var.endpoints : "${local.arn}:endpoint/${lower(name)}"],
        [for name in var.inference_components : "${local.arn}:inference-component/${name}"],
      )
    }]
  })
}
