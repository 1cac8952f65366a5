# Who may do what: least privilege, and the two roles without which dead-lettering silently does not happen.

variables {
  project_id = "my-project"
}

run "worker_has_three_roles_on_two_resources" {
  command = plan

  assert {
    condition = (
      google_pubsub_subscription_iam_member.worker_pulls["requests"].role == "roles/pubsub.subscriber"
      && google_pubsub_subscription_iam_member.worker_pulls["requests"].subscription == "inference-requests-worker"
      && google_pubsub_subscription_iam_member.worker_reads_policy["requests"].role == "roles/pubsub.viewer"
      && google_pubsub_subscription_iam_member.worker_reads_policy["requests"].subscription == "inference-requests-worker"
      && google_pubsub_topic_iam_member.worker_answers.role == "roles/pubsub.publisher"
      && google_pubsub_topic_iam_member.worker_answers.topic == "inference-responses"
    )
    error_message = "The worker pulls requests, reads the subscription's policy and publishes answers, no more."
  }

  assert {
    condition = alltrue([
      for member in [
        google_pubsub_subscription_iam_member.worker_pulls["requests"].member,
        google_pubsub_subscription_iam_member.worker_reads_policy["requests"].member,
        google_pubsub_topic_iam_member.worker_answers.member,
      ] : can(regex("^principal://iam\\.googleapis\\.com/projects/[0-9]+/locations/global/workloadIdentityPools/my-project\\.svc\\.id\\.goog/subject/ns/inference/sa/inference-worker$", member))
    ])
    error_message = "The worker is its Kubernetes service account, named directly."
  }
}

run "pubsub_may_bury" {
  command = plan

  assert {
    condition = (
      google_pubsub_topic_iam_member.agent_buries.role == "roles/pubsub.publisher"
      && google_pubsub_topic_iam_member.agent_buries.topic == "inference-dead-letters"
      && google_pubsub_subscription_iam_member.agent_takes["requests"].role == "roles/pubsub.subscriber"
      && google_pubsub_subscription_iam_member.agent_takes["requests"].subscription == "inference-requests-worker"
    )
    error_message = "Pub/Sub's agent publishes to the dead-letter topic and acks on the request subscription."
  }

  assert {
    condition     = can(regex("^serviceAccount:service-[0-9]+@gcp-sa-pubsub\\.iam\\.gserviceaccount\\.com$", google_pubsub_topic_iam_member.agent_buries.member))
    error_message = "It is Pub/Sub's own service agent of this project."
  }
}

run "keda_reads_metrics" {
  command = plan

  assert {
    condition = (
      one(google_project_iam_member.keda_reads_metrics).role == "roles/monitoring.viewer"
      && endswith(one(google_project_iam_member.keda_reads_metrics).member, "/subject/ns/keda/sa/keda-operator")
    )
    error_message = "KEDA's operator may read metrics."
  }
}

run "without_keda_nothing_is_granted_on_the_project" {
  command = plan

  variables {
    keda_operator = null
  }

  assert {
    condition     = length(google_project_iam_member.keda_reads_metrics) == 0
    error_message = "No KEDA, no role."
  }
}

run "a_cluster_elsewhere_has_its_own_pool" {
  command = plan

  variables {
    workload_identity_project_id = "clusters"
  }

  assert {
    condition     = strcontains(output.worker_principal, "/workloadIdentityPools/clusters.svc.id.goog/")
    error_message = "The pool is the cluster's project's."
  }

  assert {
    condition     = data.google_project.cluster.number != data.google_project.this.number
    error_message = "So is the number."
  }
}

run "people_get_one_role_each" {
  command = plan

  variables {
    producers = ["group:senders@example.com"]
    consumers = ["group:readers@example.com"]
  }

  assert {
    condition = (
      google_pubsub_topic_iam_member.producer["group:senders@example.com"].role == "roles/pubsub.publisher"
      && google_pubsub_topic_iam_member.producer["group:senders@example.com"].topic == "inference-requests"
      && google_pubsub_subscription_iam_member.consumer["group:readers@example.com"].role == "roles/pubsub.subscriber"
      && google_pubsub_subscription_iam_member.consumer["group:readers@example.com"].subscription == "inference-responses-reader"
    )
    error_message = "Producers publish requests, consumers read answers."
  }
}
