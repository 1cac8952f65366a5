# Who may take the role, and what it may do: one service account, two actions, named endpoints.

variables {
  region         = "eu-west-1"
  endpoints      = ["Llama-3-70b", "other"]
  gke_project_id = "my-project"
  gke_location   = "europe-west1"
  gke_cluster    = "c1"
}

run "only_the_worker_of_this_cluster" {
  command = plan

  assert {
    condition = (
      one(aws_iam_openid_connect_provider.cluster[*].url) == "https://container.googleapis.com/v1/projects/my-project/locations/europe-west1/clusters/c1"
      && one(aws_iam_openid_connect_provider.cluster[*].client_id_list) == tolist(["sts.amazonaws.com"])
    )
    error_message = "AWS trusts the cluster's issuer, for tokens that are meant for AWS."
  }

  assert {
    condition     = output.subject == "system:serviceaccount:inference:inference-worker"
    error_message = "The subject is the service account of deploy/kustomize."
  }
}

run "only_two_actions_on_named_endpoints" {
  command = plan

  variables {
    inference_components = ["part-1"]
  }

  assert {
    condition = jsondecode(aws_iam_role_policy.invokes.policy).Statement == [{
      Effect = "Allow"
      Action = ["sagemaker:InvokeEndpoint", "sagemaker:InvokeEndpointWithResponseStream"]
      Resource = [
        "arn:aws:sagemaker:eu-west-1:123456789012:endpoint/llama-3-70b",
        "arn:aws:sagemaker:eu-west-1:123456789012:endpoint/other",
        "arn:aws:sagemaker:eu-west-1:123456789012:inference-component/part-1",
      ]
    }]
    error_message = "The role invokes these endpoints and components, and does nothing else."
  }
}

run "a_provider_that_is_there_is_used" {
  command = plan

  variables {
    identity_provider_arn = "arn:aws:iam::123456789012:oidc-provider/container.googleapis.com/v1/projects/my-project/locations/europe-west1/clusters/c1"
  }

  assert {
    condition     = length(aws_iam_openid_connect_provider.cluster) == 0
    error_message = "An account has one identity provider for an issuer."
  }

  assert {
    condition = jsondecode(aws_iam_role.worker.assume_role_policy).Statement == [{
      Effect    = "Allow"
      Action    = "sts:AssumeRoleWithWebIdentity"
      Principal = { Federated = "arn:aws:iam::123456789012:oidc-provider/container.googleapis.com/v1/projects/my-project/locations/europe-west1/clusters/c1" }
      Condition = {
        StringEquals = {
          "container.googleapis.com/v1/projects/my-project/locations/europe-west1/clusters/c1:aud" = "sts.amazonaws.com"
          "container.googleapis.com/v1/projects/my-project/locations/europe-west1/clusters/c1:sub" = "system:serviceaccount:inference:inference-worker"
        }
      }
    }]
    error_message = "Only this service account's tokens, only those meant for AWS."
  }
}

run "no_pattern_of_endpoints" {
  command = plan

  variables {
    endpoints = ["*"]
  }

  expect_failures = [var.endpoints]
}
