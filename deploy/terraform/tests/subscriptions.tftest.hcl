# What a plan says about topics and subscriptions.

variables {
  project_id = "my-project"
}

run "nothing_expires_and_nothing_spins" {
  command = plan

  assert {
    condition = alltrue([
      for subscription in [
        google_pubsub_subscription.requests["inference-requests-worker"],
        google_pubsub_subscription.responses,
        google_pubsub_subscription.dead_letters,
      ] : one(subscription.expiration_policy).ttl == ""
    ])
    error_message = "A subscription without a pull for 31 days would be deleted."
  }

  assert {
    condition     = one(google_pubsub_subscription.requests["inference-requests-worker"].retry_policy).minimum_backoff == "10s"
    error_message = "The first redelivery comes after 10 s."
  }

  assert {
    condition     = one(google_pubsub_subscription.requests["inference-requests-worker"].retry_policy).maximum_backoff == "600s"
    error_message = "The last ones come every 10 min."
  }

  assert {
    condition     = google_pubsub_subscription.requests["inference-requests-worker"].ack_deadline_seconds == 20
    error_message = "A killed pod's messages wait 20 s."
  }

  assert {
    condition     = one(google_pubsub_subscription.requests["inference-requests-worker"].dead_letter_policy).max_delivery_attempts == 20
    error_message = "Evictions must not bury a good message."
  }
}

run "what_is_buried_is_kept" {
  command = plan

  assert {
    condition     = google_pubsub_subscription.dead_letters.message_retention_duration == "2678400s"
    error_message = "Dead letters are kept for 31 days."
  }

  assert {
    condition     = length(google_pubsub_subscription.dead_letters.dead_letter_policy) == 0
    error_message = "Dead letters do not die again."
  }

  assert {
    condition     = google_pubsub_subscription.requests["inference-requests-worker"].message_retention_duration == "604800s"
    error_message = "Requests are kept for a week."
  }
}

run "names_follow_the_prefix" {
  command = plan

  variables {
    prefix = "night"
  }

  assert {
    condition     = output.request_subscription == "night-requests-worker" && output.response_topic == "night-responses"
    error_message = "Two installations in one project differ by their prefix."
  }
}

run "too_few_attempts_are_refused" {
  command = plan

  variables {
    max_delivery_attempts = 5
  }

  expect_failures = [var.max_delivery_attempts]
}

run "a_spinning_retry_is_refused" {
  command = plan

  variables {
    minimum_backoff_seconds = 0
  }

  expect_failures = [var.minimum_backoff_seconds]
}

run "what_pubsub_refuses_is_refused_here" {
  command = plan

  variables {
    ack_deadline_seconds    = 5
    maximum_backoff_seconds = 3600
    retention_days          = 60
    prefix                  = "google"
  }

  expect_failures = [
    var.ack_deadline_seconds,
    var.maximum_backoff_seconds,
    var.retention_days,
    var.prefix,
  ]
}

run "each_filter_has_a_subscription" {
  command = plan

  variables {
    request_filter         = "NOT attributes:model"
    filtered_subscriptions = { llama = "attributes.model = \"llama\"" }
  }

  assert {
    condition     = google_pubsub_subscription.requests["inference-requests-worker"].filter == "NOT attributes:model"
    error_message = "The worker's subscription gets what the others leave."
  }

  assert {
    condition = (
      google_pubsub_subscription.requests["inference-requests-llama-worker"].name == "inference-requests-llama-worker"
      && google_pubsub_subscription.requests["inference-requests-llama-worker"].filter == "attributes.model = \"llama\""
      && one(google_pubsub_subscription.requests["inference-requests-llama-worker"].dead_letter_policy).max_delivery_attempts == 20
      && one(google_pubsub_subscription.requests["inference-requests-llama-worker"].expiration_policy).ttl == ""
    )
    error_message = "It is like the worker's own, but for its filter."
  }

  assert {
    condition = alltrue([
      for granted in [
        google_pubsub_subscription_iam_member.worker_pulls,
        google_pubsub_subscription_iam_member.worker_reads_policy,
        google_pubsub_subscription_iam_member.agent_takes,
      ] : granted["filtered-llama"].subscription == "inference-requests-llama-worker"
    ])
    error_message = "The worker and Pub/Sub's agent need the same roles there."
  }
}

run "a_filter_says_something" {
  command = plan

  variables {
    filtered_subscriptions = { all = "" }
  }

  expect_failures = [var.filtered_subscriptions]
}
