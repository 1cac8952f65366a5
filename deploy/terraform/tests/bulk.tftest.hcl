# Exports of answers and imports of requests: nothing unless asked for, and nothing lost silently.

variables {
  project_id = "my-project"
}

run "off_by_default" {
  command = plan

  assert {
    condition = (
      length(google_pubsub_subscription.bigquery) == 0
      && length(google_pubsub_subscription.storage) == 0
      && length(google_pubsub_topic.unwritten) == 0
      && length(google_service_account.query) == 0
      && length(google_bigquery_reservation.query) == 0
      && length(google_dataflow_job.requests) == 0
      && length(google_service_account.dataflow) == 0
      && length(google_pubsub_topic.requests.ingestion_data_source_settings) == 0
    )
    error_message = "Each is an option."
  }
}

run "each_option_does_what_it_says" {
  command = plan

  variables {
    responses_to_bigquery  = { dataset = "inference" }
    responses_to_storage   = { bucket = "my-answers" }
    requests_from_storage  = { bucket = "my-requests", since = "2026-11-01T00:00:00Z" }
    requests_from_bigquery = { dataset = "inference", table = "requests", location = "europe-west1" }
  }

  assert {
    condition = (
      one(one(google_pubsub_subscription.bigquery).bigquery_config).table == "my-project.inference.responses"
      && one(one(google_pubsub_subscription.bigquery).bigquery_config).write_metadata
      && one(one(google_pubsub_subscription.bigquery).expiration_policy).ttl == ""
    )
    error_message = "Every answer is written with its attributes, for ever."
  }

  assert {
    condition     = [for column in jsondecode(one(google_bigquery_table.responses).schema) : column.name] == ["subscription_name", "message_id", "publish_time", "data", "attributes"]
    error_message = "The columns are those that Pub/Sub writes."
  }

  assert {
    condition     = toset(values(google_bigquery_table_iam_member.agent_writes_rows)[*].role) == toset(["roles/bigquery.dataEditor", "roles/bigquery.metadataViewer"])
    error_message = "Pub/Sub's agent may write this table, and no other one."
  }

  assert {
    condition = (
      one(google_pubsub_topic.unwritten).name == "inference-responses-unwritten"
      && one(google_pubsub_subscription.unwritten).message_retention_duration == "2678400s"
      && toset(keys(google_pubsub_subscription_iam_member.agent_takes_unwritten)) == toset(["bigquery", "storage"])
    )
    error_message = "A row that cannot be written is kept, apart from dead requests."
  }

  assert {
    condition = (
      one(one(google_pubsub_subscription.storage).cloud_storage_config).bucket == "my-answers"
      && one(one(google_pubsub_subscription.storage).cloud_storage_config).max_duration == "300s"
      && one(one(one(google_pubsub_subscription.storage).cloud_storage_config).avro_config).write_metadata
      && one(google_pubsub_subscription.storage).ack_deadline_seconds == 600
    )
    error_message = "Avro with the attributes, an object at least every five minutes."
  }

  assert {
    condition     = toset(values(google_storage_bucket_iam_member.agent_writes_objects)[*].role) == toset(["roles/storage.objectCreator", "roles/storage.legacyBucketReader"])
    error_message = "Pub/Sub's agent may add objects, and change none."
  }

  assert {
    condition = (
      one(one(google_pubsub_topic.requests.ingestion_data_source_settings).cloud_storage).bucket == "my-requests"
      && one(one(google_pubsub_topic.requests.ingestion_data_source_settings).cloud_storage).match_glob == "**.jsonl"
      && one(one(google_pubsub_topic.requests.ingestion_data_source_settings).cloud_storage).minimum_object_create_time == "2026-11-01T00:00:00Z"
      && length(one(one(google_pubsub_topic.requests.ingestion_data_source_settings).cloud_storage).text_format) == 1
      && one(one(google_pubsub_topic.requests.ingestion_data_source_settings).platform_logs_settings).severity == "WARNING"
    )
    error_message = "A message for each line, and a log of the lines that were none."
  }

  assert {
    condition = (
      one(google_pubsub_topic_iam_member.agent_imports).role == "roles/pubsub.publisher"
      && toset(values(google_storage_bucket_iam_member.agent_reads_objects)[*].role) == toset(["roles/storage.objectViewer", "roles/storage.legacyBucketReader"])
    )
    error_message = "Pub/Sub's agent may read the bucket and publish to the topic."
  }

  assert {
    condition = (
      one(google_bigquery_reservation.query).edition == "ENTERPRISE"
      && one(google_bigquery_reservation.query).slot_capacity == 50
      && one(google_bigquery_reservation_assignment.query).job_type == "CONTINUOUS"
      && one(google_bigquery_reservation_assignment.query).assignee == "projects/my-project"
    )
    error_message = "A continuous query needs slots of the Enterprise edition."
  }

  assert {
    condition = (
      one(google_bigquery_table_iam_member.query_reads_rows).table_id == "requests"
      && toset(values(google_pubsub_topic_iam_member.query_publishes)[*].role) == toset(["roles/pubsub.publisher", "roles/pubsub.viewer"])
    )
    error_message = "Its account reads one table and publishes to one topic."
  }

  assert {
    condition = (
      strcontains(output.continuous_query, "projects/my-project/topics/inference-requests")
      && strcontains(output.continuous_query, "`my-project.inference.requests`")
    )
    error_message = "The query names topic and table."
  }
}

run "text_has_no_avro" {
  command = plan

  variables {
    responses_to_storage = { bucket = "my-answers", format = "text" }
  }

  assert {
    condition = (
      length(one(one(google_pubsub_subscription.storage).cloud_storage_config).avro_config) == 0
      && one(one(google_pubsub_subscription.storage).cloud_storage_config).filename_suffix == ".jsonl"
    )
    error_message = "The answers alone."
  }
}

run "what_pubsub_does_not_take_is_refused" {
  command = plan

  variables {
    responses_to_storage = { bucket = "my-answers", format = "parquet", max_seconds = 10 }
  }

  expect_failures = [var.responses_to_storage]
}

run "dataflow_publishes_a_set_of_files_once" {
  command = plan

  variables {
    requests_from_dataflow = {
      files        = "gs://my-requests/night/*.jsonl"
      temp         = "gs://my-bucket/dataflow"
      region       = "europe-west1"
      start_before = timeadd(timestamp(), "1h")
    }
  }

  assert {
    condition = (
      one(google_dataflow_job.requests).template_gcs_path == "gs://dataflow-templates-europe-west1/latest/GCS_Text_to_Cloud_PubSub"
      && one(google_dataflow_job.requests).name == "inference-requests"
      && one(google_dataflow_job.requests).temp_gcs_location == "gs://my-bucket/dataflow"
      && one(google_dataflow_job.requests).max_workers == 10
      && one(google_dataflow_job.requests).on_delete == "cancel"
    )
    error_message = "A job of Google's template in its region, of at most ten workers."
  }

  assert {
    condition = (
      one(google_project_iam_member.dataflow_works).role == "roles/dataflow.worker"
      && google_storage_bucket_iam_member.dataflow_reads_and_keeps["objectViewer"].bucket == "my-requests"
      && google_storage_bucket_iam_member.dataflow_reads_and_keeps["objectViewer"].role == "roles/storage.objectViewer"
      && google_storage_bucket_iam_member.dataflow_reads_and_keeps["objectAdmin"].bucket == "my-bucket"
      && toset(values(google_pubsub_topic_iam_member.dataflow_publishes)[*].role) == toset(["roles/pubsub.publisher", "roles/pubsub.viewer"])
    )
    error_message = "Its account reads the files, writes to the other bucket, and publishes to one topic."
  }
}

run "dataflow_cannot_start_late" {
  command = plan

  variables {
    requests_from_dataflow = {
      files        = "gs://my-requests/*.jsonl"
      temp         = "gs://my-bucket/dataflow"
      region       = "europe-west1"
      start_before = timeadd(timestamp(), "-1m")
    }
  }

  expect_failures = [var.requests_from_dataflow]
}

run "dataflow_cannot_start_for_ever" {
  command = plan

  variables {
    requests_from_dataflow = {
      files        = "gs://my-requests/*.jsonl"
      temp         = "gs://my-bucket/dataflow"
      region       = "europe-west1"
      start_before = timeadd(timestamp(), "25h")
    }
  }

  expect_failures = [var.requests_from_dataflow]
}

run "dataflow_and_the_import_topic_do_not_publish_the_same_files" {
  command = plan

  variables {
    requests_from_storage = { bucket = "my-requests" }
    requests_from_dataflow = {
      files        = "gs://my-requests/*.jsonl"
      temp         = "gs://my-bucket/dataflow"
      region       = "europe-west1"
      start_before = timeadd(timestamp(), "1h")
    }
  }

  expect_failures = [var.requests_from_dataflow]
}

run "dataflow_takes_paths_in_buckets" {
  command = plan

  variables {
    requests_from_dataflow = {
      files        = "gs://my-requests"
      temp         = "gs://my-bucket/dataflow"
      region       = "europe-west1"
      start_before = timeadd(timestamp(), "1h")
    }
  }

  expect_failures = [var.requests_from_dataflow]
}
