# What the Files and Batches API gets, and only when it is asked for.

variables {
  project_id = "my-project"
  batches = {
    bucket   = "my-project-inference-batches"
    location = "EU"
  }
}

run "answers_and_dead_letters_of_lines_have_subscriptions" {
  command = plan

  assert {
    condition = (
      google_pubsub_subscription.batches["responses"].name == "inference-responses-batches"
      && google_pubsub_subscription.batches["dead-letters"].name == "inference-dead-letters-batches"
      && alltrue([
        for each in google_pubsub_subscription.batches : each.filter == "hasPrefix(attributes.run_id, \"batch_\")"
      ])
    )
    error_message = "They get the lines of batches and nothing else."
  }

  assert {
    condition = alltrue([
      for each in google_pubsub_subscription.batches : (
        one(each.expiration_policy).ttl == "" && length(each.dead_letter_policy) == 0
      )
    ])
    error_message = "They do not expire, and an answer that cannot be stored waits."
  }
}

run "contents_of_files_are_private" {
  command = plan

  assert {
    condition = (
      one(google_storage_bucket.batches).uniform_bucket_level_access
      && one(google_storage_bucket.batches).public_access_prevention == "enforced"
    )
    error_message = "Nobody reads them but by a role."
  }
}

run "its_account_has_three_kinds_of_roles" {
  command = plan

  assert {
    condition = (
      one(google_pubsub_topic_iam_member.batches_publishes).role == "roles/pubsub.publisher"
      && one(google_pubsub_topic_iam_member.batches_publishes).topic == "inference-requests"
      && alltrue([
        for key, each in google_pubsub_subscription_iam_member.batches_reads : (
          each.role == "roles/pubsub.subscriber" && each.subscription == "inference-${key}-batches"
        )
      ])
      && length(google_pubsub_subscription_iam_member.batches_reads) == 2
      && one(google_storage_bucket_iam_member.batches_keeps_files).role == "roles/storage.objectUser"
      && one(google_storage_bucket_iam_member.batches_keeps_files).bucket == "my-project-inference-batches"
    )
    error_message = "It publishes requests, reads answers and dead letters, and keeps files."
  }

  assert {
    condition = alltrue([
      for each in [
        one(google_pubsub_topic_iam_member.batches_publishes).member,
        google_pubsub_subscription_iam_member.batches_reads["responses"].member,
        google_pubsub_subscription_iam_member.batches_reads["dead-letters"].member,
        one(google_storage_bucket_iam_member.batches_keeps_files).member,
      ] : each == output.batches_principal && endswith(each, "/subject/ns/inference/sa/inference-worker-batches")
    ])
    error_message = "It is an account of its own."
  }
}

run "it_cancels_over_the_control_topic" {
  command = plan

  variables {
    control = {}
  }

  assert {
    condition = (
      one(google_pubsub_topic_iam_member.batches_cancels).role == "roles/pubsub.publisher"
      && one(google_pubsub_topic_iam_member.batches_cancels).topic == "inference-control"
      && one(google_pubsub_topic_iam_member.batches_cancels).member == output.batches_principal
    )
    error_message = "Where there is a control topic, workers are told of cancelled batches."
  }
}

run "without_it_nothing_is_made" {
  command = plan

  variables {
    batches = null
  }

  assert {
    condition = (
      length(google_pubsub_subscription.batches) == 0
      && length(google_storage_bucket.batches) == 0
      && length(google_pubsub_topic_iam_member.batches_publishes) == 0
      && length(google_pubsub_topic_iam_member.batches_cancels) == 0
      && output.batches == null
    )
    error_message = "No batches, no bucket, no roles."
  }
}

run "readers_can_be_spared_the_answers_to_batches" {
  command = plan

  variables {
    response_filter = "NOT hasPrefix(attributes.run_id, \"batch_\")"
  }

  assert {
    condition     = google_pubsub_subscription.responses.filter == "NOT hasPrefix(attributes.run_id, \"batch_\")"
    error_message = "The filter is the reader's."
  }
}
