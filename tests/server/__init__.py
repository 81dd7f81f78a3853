"""Tests of the server, and which of them shows what a server for agents has to do.

requests
     1  content as string, null and parts: test_chat.py::test_content_comes_in_many_forms
     2  developer is system: test_chat.py::test_developer_is_system_and_no_system_message_is_lost
     3  limits by both names, null, too large: test_chat.py::test_limits_by_both_names_and_none
        generation/test_same_output.py::test_limits_reach_to_the_end_of_the_context
     4  unknown and null fields, wrong ones: test_chat.py::test_null_and_unknown_fields_are_passed_over
        test_chat.py::test_a_wrong_field_is_named
     5  any model name, its context: test_completions.py::test_the_model_is_described
     6  arguments in the history: test_tools.py::test_a_conversation_with_a_result_goes_on
stream
     7  first and last chunks: test_chat.py::test_a_stream_adds_up_to_the_whole_and_ends_as_it_should
        test_chat.py::test_stream_options
     8  streamed as whole, to the byte: test_real_model.py::test_characters_of_several_tokens_come_whole
        test_real_model.py::test_streamed_beside_others_and_drafted_it_is_the_text_of_generate
     9  finish reasons, no half call: test_tools.py::test_a_call_that_the_limit_cuts_is_no_call
    10  stop strings and ends: generation/test_gemma.py::test_every_end_of_the_format_ends_an_answer
        generation/test_gemma.py::test_a_stop_string_across_tokens_and_rounds
    11  comments in a long prompt: test_life_cycle.py::test_keep_alive_comments_come_while_a_prompt_is_read
        endpoints/test_agents.py::test_comments_stand_in_the_streams_that_clients_read
    12  errors in a stream: test_protocols.py::test_errors_in_each_protocols_stream
same output, honest numbers
    13  the same text: generation/test_same_output.py::test_text_and_logprobs_are_the_same_with_every_drafter
        test_life_cycle.py::test_texts_beside_each_other_are_those_of_texts_alone
    14  the same logprobs: generation/test_same_output.py::test_text_and_logprobs_are_the_same_with_every_drafter
    15  counts add up: generation/test_same_output.py::test_counts_equal_those_of_the_metrics
    16  predictions: test_chat.py::test_a_prediction_is_drafted_from_counted_and_changes_nothing
        test_real_model.py::test_a_prediction_of_an_edited_file
    17  what serving costs: generation/test_same_output.py::test_serving_costs_little_beside_the_passes
tools and thinking
    18  the first piece of a call: test_tools.py::test_a_call_through_openai
    19  parallel calls: generation/test_gemma.py::test_parallel_calls_of_one_function_are_all_there
    20  types by the schema: generation/test_gemma.py::test_types_are_those_of_the_schema
    21  tool_choice, parallel_tool_calls: generation/test_gemma.py::test_choices_of_tools_hold_against_the_model
    22  answers by a schema: test_tools.py::test_a_schema_is_kept_with_drafts_and_sampled
        test_tools.py::test_a_schema_that_no_grammar_has_is_named
        formats/test_grammars.py::test_a_thought_may_come_before_a_schema
    23  thoughts: generation/test_gemma.py::test_thoughts_are_split_from_content
        generation/test_gemma.py::test_a_thought_right_after_a_tools_result
    24  malformed output is content: formats/test_answers.py::test_no_sequence_of_tokens_is_an_error
        generation/test_gemma.py::test_a_call_that_nobody_can_take_is_content
cache
    25  cached tokens, past the window: generation/test_cache.py::test_a_second_turn_is_cached_past_the_window
        test_chat.py::test_cached_tokens_are_exact
    26  after a tool loop:
        generation/test_gemma.py::test_after_a_tool_loop_the_next_turn_is_read_from_the_last_users_on
    27  side requests and billing headers: generation/test_cache.py::test_a_title_request_does_not_end_the_chat
        test_protocols.py::test_a_billing_header_that_changes_costs_nothing
    28  after a restart: generation/test_cache.py::test_a_restart_goes_on_with_saved_conversations
life cycle
    29  clients that leave: test_life_cycle.py::test_a_client_that_leaves_ends_its_text
        test_life_cycle.py::test_a_client_that_leaves_while_its_prompt_is_read_or_queued
    30  answers meanwhile: test_life_cycle.py::test_others_are_answered_during_a_generation
        test_life_cycle.py::test_while_the_model_is_loaded_and_while_it_ends
    31  a full queue: test_life_cycle.py::test_a_full_queue_is_told_with_a_time_to_come_back
    32  prompts that are too long, errors: test_chat.py::test_a_prompt_that_is_too_long_is_told_with_both_numbers
        test_completions.py::test_errors_of_paths_are_json
    33  two signals: test_listen.py::test_ctrl_c_lets_answers_end_and_keeps_conversations
        test_listen.py::test_the_second_signal_ends_streams_with_an_error
    34  no leak: test_life_cycle.py::test_random_requests_and_disconnects_leave_nothing_behind
security
    35  hosts, origins, bodies, keys: test_guard.py::test_the_name_that_a_request_calls_the_server_by
        test_guard.py::test_pages_of_other_sites_are_refused
        test_guard.py::test_bodies_must_be_declared_as_json test_guard.py::test_keys
        test_guard.py::test_another_address_needs_a_key
clients
    36  real clients, ten turns: endpoints/test_agents.py::test_openai
        endpoints/test_agents.py::test_other_python_clients endpoints/test_agents.py::test_clients_on_node
        test_protocols.py::test_anthropic_messages
"""
