# Cancelling: a topic, and what a worker needs to hear it; only when it is asked for.

variables {
  project_id = "my-project"
}

run "without_it_nothing_is_made" {
  command = plan

  assert {
    condition = (
      length(google_pubsub_topic.control) == 0
      && length(google_project_iam_custom_role.control) == 0
      && length(google_project_iam_member.worker_makes_its_subscription) == 0
      && output.control_topic == null
    )
    error_message = "No role on the project that nobody asked for."
  }
}

run "workers_hear_what_was_said_before" {
  command = plan

  variables {
    control = {}
  }

  assert {
    condition = (
      one(google_pubsub_topic.control).name == "inference-control"
      && one(google_pubsub_topic.control).message_retention_duration == "86400s"
      && output.control_topic == "inference-control"
    )
    error_message = "The topic keeps its messages for as long as a worker remembers them."
  }
}

run "a_worker_makes_a_subscription_and_nothing_else" {
  command = plan

  variables {
    control = { cancellers = ["group:senders@example.com"] }
  }

  assert {
    condition = one(google_project_iam_custom_role.control).permissions == toset([
      "pubsub.subscriptions.consume", "pubsub.subscriptions.create", "pubsub.subscriptions.delete",
    ])
    error_message = "Three permissions on the project."
  }

  assert {
    condition = (
      one(google_project_iam_member.worker_makes_its_subscription).role == "projects/my-project/roles/inference_control"
      && one(google_project_iam_member.worker_makes_its_subscription).member == output.worker_principal
      && one(google_pubsub_topic_iam_member.worker_attaches).role == "roles/pubsub.subscriber"
      && one(google_pubsub_topic_iam_member.worker_attaches).topic == "inference-control"
      && one(google_pubsub_topic_iam_member.worker_attaches).member == output.worker_principal
    )
    error_message = "The worker may make subscriptions, and attach them to this topic."
  }

  assert {
    condition = (
      google_pubsub_topic_iam_member.canceller["group:senders@example.com"].role == "roles/pubsub.publisher"
      && google_pubsub_topic_iam_member.canceller["group:senders@example.com"].topic == "inference-control"
    )
    error_message = "Those who may cancel publish there."
  }
}
